"""MaskedLinear, against torch's dense linear layer and SparseProp."""

from __future__ import annotations

import pytest

from bench.cpu import account, shapes, verdict
from bench.cpu.layers import OURS, make_data, role, training
from bench.cpu.targets import DENSE, SPARSEPROP

SECONDS = 1.5


def pytest_generate_tests(metafunc):
    quick = metafunc.config.getoption("--quick")
    metafunc.parametrize("shape", shapes.QUICK_LINEARS if quick else shapes.LINEARS, ids=str)


def test_linear(shape, threads, effort, race, ledger):
    data = make_data(shape)
    done = race(training(data, effort.sparsities), SECONDS)
    for measure in ("forward", "forward+backward"):
        for sparsity in effort.sparsities:
            for baseline in (DENSE, SPARSEPROP):
                row = verdict.row(
                    done,
                    group="linear",
                    case=str(shape),
                    measure=measure,
                    threads=threads,
                    sparsity=sparsity,
                    baseline=baseline if baseline == DENSE else role(baseline, sparsity),
                    baseline_label=baseline,
                    ours=role(OURS, sparsity),
                    label="MaskedLinear",
                    operator="masked_linear",
                )
                ledger += [row] if row else []
            ledger += account.rows_of(done, "linear", shape, measure, threads, sparsity)
    if reason := done.failure(role(OURS, effort.sparsities[0])):
        pytest.fail(reason)
