"""The CPU benchmarks: the sums behind the table, and one group run as `make bench-cpu` runs it."""

import csv
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last: `bench` is not installed, everything else is

from bench.cpu import (  # noqa: E402
    account,
    host,
    kept_memory,
    layers,
    networks,
    rows,
    shapes,
    summary,
    targets,
    verdict,
)
from bench.cpu.effort import FULL, QUICK  # noqa: E402
from bench.cpu.race import Contender, Race  # noqa: E402
from bench.cpu.targets import Target  # noqa: E402


def contender(role, variant, *seconds):
    """Takes `seconds` in turn, the last for ever: cold, then warmed up, then raced."""
    left = list(seconds)
    return Contender(
        role=role,
        variant=variant,
        build=lambda: lambda: {"all": left.pop(0) if len(left) > 1 else left[0]},
    )


def broken(role):
    def build():
        raise RuntimeError("cannot be built")

    return Contender(role=role, variant="", build=build)


def run(*contenders, rounds=3):
    race = Race(contenders)
    race.warm_up()
    for _ in range(rounds):
        race.round()
    return race


# --- the race -------------------------------------------------------------------------------------


def test_speedup_is_the_median_of_ratios_within_rounds():
    dense = contender("dense", "", 1.0, 1.0, 4.0, 9.0)
    ours = contender("ours", "", 1.0, 1.0, 1.0, 3.0)
    found = run(dense, ours).compare("dense", "ours", "all")
    assert found.speedup == 3.0  # the median of 1, 4, 3, not of the medians 4 and 1
    assert (found.baseline_ms, found.ours_ms, found.rounds) == (4000.0, 1000.0, 3)


def test_the_fastest_variant_stands_for_its_role():
    dense = [contender("dense", "a", 3.0), contender("dense", "b", 2.5)]
    found = run(*dense, contender("ours", "", 1.0)).compare("dense", "ours", "all")
    assert (found.baseline_variant, found.speedup) == ("b", 2.5)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_hopeless_variants_leave_the_race_whoever_comes_first(order):
    variants = [contender("dense", "slow", 3.1), contender("dense", "fast", 2.0)]
    race = run(*(variants[i] for i in order))
    assert list(race.medians()) == ["dense fast all"]


def test_short_turns_are_repeated_and_reported_for_one_call():
    race = run(contender("ours", "", 0.0004))
    assert race.seconds_a_round == pytest.approx(0.002)
    assert race.medians()["ours  all"] == pytest.approx(0.4)


def test_every_round_starts_with_the_next_contender():
    order = []

    def build(name):
        def once():
            order.append(name)
            return {"all": 1.0}

        return lambda: once

    race = Race([Contender(role=name, variant="", build=build(name)) for name in "abc"])
    race.warm_up()
    order.clear()
    for _ in range(3):
        race.round()
    assert "".join(order) == "abcbcacab"


def test_failures_cost_their_own_row_alone():
    race = run(broken("SparseProp"), contender("dense", "", 2.0), contender("ours", "", 1.0))
    row = verdict.row(
        race,
        group="conv",
        case="a",
        measure="all",
        threads=1,
        baseline="SparseProp",
        ours="ours",
        target=Target(1.3),
    )
    assert row.note == "RuntimeError: cannot be built"
    assert (row.speedup, row.outcome) == (None, "")
    assert race.compare("dense", "ours", "all").speedup == 2.0
    assert not race.has("absent")


def test_our_own_failure_is_one():
    race = run(contender("dense", "", 2.0), broken("ours"))
    row = verdict.row(
        race, group="conv", case="a", measure="all", threads=1, baseline="dense", ours="ours"
    )
    assert row.outcome == rows.FAILED


def test_roles_and_variants_must_differ():
    with pytest.raises(ValueError, match="contenders: expected distinct"):
        Race([contender("dense", "a", 1.0)] * 2)


def test_effort_keeps_within_its_limits():
    assert FULL.rounds(1.0, 7.9) == 7
    assert FULL.rounds(1.0, 6.9) == 5  # odd
    assert FULL.rounds(100.0, 8.0) == 3
    assert FULL.rounds(1e-9, 8.0) == FULL.most_rounds
    assert QUICK.rounds(100.0, 8.0) == 1


# --- targets and the table ------------------------------------------------------------------------


def test_targets_are_floors_of_speedups_or_ceilings_of_costs():
    assert Target(1.2).met(1.2)
    assert not Target(1.2).met(1.19)
    assert Target(0.6, cost=True).met(1 / 0.6)
    assert not Target(0.6, cost=True).met(1.6)
    assert (str(Target(1.2)), str(Target(0.6, cost=True))) == (">= 1.2", "<= 0.6")


def test_targets_of_shapes():
    assert targets.of_shape("conv", "forward+backward", "SparseProp", 0.98) == Target(1.3)
    assert targets.of_shape("conv", "forward", "dense", 0.8) == Target(1.0)
    assert targets.of_shape("conv", "forward", "dense", 0.9) is None
    assert targets.of_shape("linear", "forward", "dense", 0.8) is None


def test_the_shapes_are_those_of_the_published_comparison():
    assert len(set(map(str, shapes.CONVOLUTIONS))) == 24
    assert len(shapes.BATCH_1) == 14
    assert len(set(map(str, shapes.LINEARS))) == 8


def test_an_account_is_the_sum_of_its_parts(monkeypatch):
    monkeypatch.setattr(account, "fetching_ms", lambda weights, sparsity, threads: weights / 1e3)
    rates = account.Rates(
        threads=1,
        bytes_a_ms=1e3,
        products_a_ms=1e6,
        backward_a_ms=2e6,
        shifted_a_ms=5e5,
        shifted_backward_a_ms=1e6,
    )
    pointwise = shapes.ConvShape(64, 32, 16, 1, 1, 2)
    pixels, weights = 2 * 16 * 16, 64 * 32
    active = 0.1 * weights
    forward = 5 + weights / 1e3 + 8 * active / 1e3 + active * pixels / 1e6
    assert account.account_ms(pointwise, "forward", 0.9, 5, rates) == pytest.approx(forward)
    read, products = 2 * 8 * active, active * pixels
    both = 5 + weights / 1e3 + read / 1e3 + products / 1e6 + 2 * products / 2e6
    assert account.account_ms(pointwise, "forward+backward", 0.9, 5, rates) == pytest.approx(both)
    packed = shapes.ConvShape(8, 8, 9, 3, 2, 1)
    expected = 0.576 + 8 * 288 / 1e3 + 288 * 25 / 1e6
    assert account.account_ms(packed, "forward", 0.5, 0, rates) == pytest.approx(expected)
    monkeypatch.setattr(account, "_is_in_place", lambda shape, active: True)
    shifted = expected + 288 * 25 / 1e6
    assert account.account_ms(packed, "forward", 0.5, 0, rates) == pytest.approx(shifted)
    both = 0.576 + 16 * 288 / 1e3 + 288 * 25 * (1 / 5e5 + 2 / 1e6)
    assert account.account_ms(packed, "forward+backward", 0.5, 0, rates) == pytest.approx(both)
    assert account.account_ms(packed, "forward", 0.5, 0, rates, contiguous=False) == pytest.approx(
        expected
    )


def test_the_sparse_convolutions_of_a_network():
    found = networks.sparse_convolutions(networks.QUICK_RESNET18)
    assert len(found) == 19
    assert found[0] == shapes.ConvShape(64, 64, 32, 3, 1, 8)
    strided = [shape for shape in found if shape.stride == 2]
    assert {(shape.channels_in, shape.side, shape.kernel) for shape in strided} == {
        (channels, side, kernel)
        for channels, side in ((64, 32), (128, 16), (256, 8))
        for kernel in (1, 3)
    }


def make_row(speedup, case="a", **fields):
    return rows.Row(
        **{
            "group": "conv",
            "case": case,
            "measure": "forward",
            "threads": 1,
            "sparsity": 0.9,
            "baseline": "dense",
            "ours": "MaskedConv2d",
            "speedup": speedup,
        }
        | fields
    )


def test_geometric_means_by_threads_and_sparsity():
    measured = [make_row(2.0), make_row(8.0, "b"), make_row(5.0, "c", threads=2)]
    measured += [make_row(9.0, "a", sparsity=0.8), make_row(4.0, "b", sparsity=0.8)]
    low, high = rows.geometric_means(measured)
    assert (low.speedup, low.target, low.outcome) == (pytest.approx(4.0), Target(2.5), "pass")
    assert (low.speedup_p20, low.speedup_p80) == (2.0, 8.0)
    assert high.speedup == pytest.approx(6.0)
    assert low.case == "geometric mean of 2"


def test_geometric_means_count_what_failed():
    (mean,) = rows.geometric_means([make_row(2.0), make_row(None, "b")])
    assert mean.speedup == pytest.approx(2.0)
    assert mean.note.endswith("1 failed")


def test_costs_are_shown_upside_down():
    row = make_row(2.0, cost=True, target=Target(0.6, cost=True), outcome="pass")
    record = rows.record(row)
    assert (record["ratio"], record["ratio_is"]) == (0.5, "ours/baseline")
    assert rows.record(make_row(2.0))["ratio_is"] == "baseline/ours"


def test_csv_and_table(tmp_path):
    measured = [
        make_row(1.5, baseline_ms=30.0, ours_ms=20.0, images=8, target=Target(1.0), outcome="pass"),
        make_row(0.5, "b", target=Target(1.0), outcome=rows.outcome(0.5, Target(1.0))),
    ]
    rows.write_csv(tmp_path / "new" / "cpu.csv", measured, {"cpu": "a, b"})
    with (tmp_path / "new" / "cpu.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["cpu"], first["ratio"], first["target"]) == ("a, b", "1.5", ">= 1")
    assert float(first["ours_images_per_s"]) == pytest.approx(400)
    assert (second["outcome"], second["baseline_ms"]) == ("MISS", "")
    text = rows.table(measured)
    assert "MISS" in text.splitlines()[2]
    assert "MiB" not in text  # no row has it
    assert rows.summary(measured) == "targets: 1 pass, 1 MISS, 0 FAILED"


# --- the layers -----------------------------------------------------------------------------------

TINY = shapes.ConvShape(4, 6, 8, 3, 2, 3)


def test_wrong_results_are_not_timed():
    data = layers.make_data(TINY)
    wrong = torch.nn.Conv2d(4, 6, 3, 2, 1, bias=False)
    input = data.input.clone().requires_grad_()
    with pytest.raises(ArithmeticError, match="output: relative error"):
        layers.check_agreement(data, wrong, input, data.grad_output, 0.9)


@pytest.mark.parametrize("shape", [TINY, shapes.LinearShape(16, 8, 4)])
def test_ours_and_dense_compute_the_same(shape):
    """SparseProp, where installed, does not for every batch; it is then left out of the race."""
    race = run(*layers.training(layers.make_data(shape), (0.5, 0.8)), rounds=1)
    assert not [role for role, _ in race.failures if not role.startswith("SparseProp")]
    assert race.compare("dense", "ours at 0.8", "forward+backward").rounds == 1


def test_masks_of_rising_sparsity_contain_one_another():
    data = layers.make_data(shapes.LINEARS[0])
    dense, sparse = data.mask(0.8), data.mask(0.98)
    assert not (sparse & ~dense).any()
    assert math.isclose(sparse.float().mean().item(), 0.02, abs_tol=1e-3)
    assert (data.weight.abs() > torch.finfo(torch.float32).tiny).float().mean() > 0.999


# --- as make bench-cpu runs it --------------------------------------------------------------------


def test_a_quick_group(tmp_path):
    command = [sys.executable, "-m", "pytest", "bench/cpu/test_linear.py", "--quick", "-q"]
    command += ["--benchmark-quiet", "--bench-out", str(tmp_path), "--bench-name", "cpu-linear"]
    has_glibc = platform.libc_ver()[0] == "glibc"
    command += ["--bench-keep-memory"] if has_glibc else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "MaskedLinear" in answer.stdout
    with (tmp_path / "cpu-linear.csv").open(newline="") as file:
        measured = list(csv.DictReader(file))
    dense = [r for r in measured if (r["group"], r["baseline"]) == ("linear", "dense")]
    assert [row["measure"] for row in dense] == ["forward", "forward+backward"]
    assert all(float(row["ours_ms"]) > 0 and row["threads"] == "1" for row in dense)
    assert {row["memory"] for row in measured} == {"kept" if has_glibc else ""}


def test_what_a_process_with_freed_memory_measures(monkeypatch):
    monkeypatch.setitem(kept_memory.CASES, "tiny", shapes.ConvShape(8, 8, 8, 1, 1, 2))
    threads = torch.get_num_threads()
    try:
        found = kept_memory.measured("tiny", "ours", 1, kept_memory.FREED)
    finally:
        torch.set_num_threads(threads)
    assert [row["measure"] for row in found] == ["forward", "forward+backward"]
    assert all(row["median_ms"] > 0 and row["peak_mib"] > 0 for row in found)


# --- what is published ----------------------------------------------------------------------------


def section(page: str, heading: str) -> str:
    """From a heading to the next one, of whatever level."""
    return (ROOT / page).read_text().split(f"\n{heading}\n")[1].split("\n#")[0]


def test_the_tables_of_the_documentation_are_those_of_the_results():
    page = "docs/performance.md"
    speedups, accounts = (
        {
            machine: "\n".join(summary.table(lines, machine, floors=floors))
            for machine in summary.MACHINES
        }
        for lines, floors in ((summary.SPEEDUPS, True), (summary.ACCOUNTS, False))
    )
    assert speedups[summary.ZEN_4] in section("README.md", "## How fast it is")
    assert speedups[summary.ZEN_4] in section(page, "## On a CPU")
    assert accounts[summary.ZEN_4] in section(page, "### Accounts")
    assert speedups[summary.XEON] in section(page, "### On a Xeon")
    assert accounts[summary.XEON] in section(page, "### On a Xeon")


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ({"vendor_id": "GenuineIntel", "cpu family": "6", "model": "207"}, "model 207"),
        ({"vendor_id": "AuthenticAMD", "cpu family": "26", "model": "2"}, "family 26"),
    ],
)
def test_a_processor_is_told_apart_from_others_of_its_maker(monkeypatch, found, named):
    monkeypatch.setattr(host, "cpu_name", lambda: "Some Processor")
    monkeypatch.setattr(host, "cpuinfo", found.get)
    assert host.processor() == f"Some Processor, {named}"
    monkeypatch.setattr(host, "cpuinfo", lambda field: "")
    assert host.processor() == "Some Processor"
