"""MaskedConv2d on the shapes of ResNets, against dense convolution and SparseProp."""

from __future__ import annotations

import pytest

from bench.cpu import account, shapes, verdict
from bench.cpu.layers import OURS, inference, make_data, role, training
from bench.cpu.targets import DENSE, SPARSEPROP, of_shape

# Seconds that the rounds of one shape may take; the large shapes take the least number of rounds.
SECONDS, SECONDS_BATCH_1 = 2.5, 0.5


def pytest_generate_tests(metafunc):
    quick = metafunc.config.getoption("--quick")
    if metafunc.function is test_conv:
        cases = shapes.QUICK_CONVOLUTIONS if quick else shapes.CONVOLUTIONS
    else:
        cases = shapes.QUICK_BATCH_1 if quick else shapes.BATCH_1
    metafunc.parametrize("shape", cases, ids=str)


def test_conv(shape, threads, effort, race, ledger):
    data = make_data(shape)
    done = race(training(data, effort.sparsities), SECONDS)
    for measure in ("forward", "forward+backward"):
        for sparsity in effort.sparsities:
            for baseline in (DENSE, SPARSEPROP):
                at = baseline if baseline == DENSE else role(baseline, sparsity)
                row = verdict.row(
                    done,
                    group="conv",
                    case=str(shape),
                    measure=measure,
                    threads=threads,
                    sparsity=sparsity,
                    baseline=at,
                    baseline_label=baseline,
                    ours=role(OURS, sparsity),
                    label="MaskedConv2d",
                    operator="masked_conv2d",
                    target=of_shape("conv", measure, baseline, sparsity),
                )
                ledger += [row] if row else []
            ledger += account.rows_of(done, "conv", shape, measure, threads, sparsity)
    if reason := done.failure(role(OURS, effort.sparsities[0])):
        pytest.fail(reason)


def test_conv_batch_1(shape, threads, effort, race, ledger):
    data = make_data(shape)
    done = race(inference(data, effort.sparsities), SECONDS_BATCH_1)
    for sparsity in effort.sparsities:
        row = verdict.row(
            done,
            group="conv-batch-1",
            case=str(shape),
            measure="inference",
            threads=threads,
            sparsity=sparsity,
            baseline=DENSE,
            ours=role(OURS, sparsity),
            label="MaskedConv2d",
            operator="masked_conv2d",
        )
        ledger += [row] if row else []
    if reason := done.failure(role(OURS, effort.sparsities[0])):
        pytest.fail(reason)
