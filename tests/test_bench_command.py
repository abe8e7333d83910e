"""`granet bench`: what it times, and the sums behind its figures."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from granet.cli import main
from granet.flops import measure, measure_activations
from granet.throughput import measure as throughput
from granet.throughput import report as bench_report
from granet.throughput import roofline, steps, stopwatch
from granet.throughput.roofline import Rates, Work, Yardsticks
from granet.throughput.steps import Setting, mask_randomly
from granet_kernels import densify, masked_layers, sparsify
from granet_kernels.ops.registry import selected_backend

CPU = torch.device("cpu")
RATES = Rates(flops_per_second=100.0, bytes_per_second=10.0)
SHORT = ["-b", "4", "--rounds", "1", "--input-size", "2,8,8", "--threads", "1", "--device", "cpu"]


def make_network(name: str, *, num_classes: int, in_channels: int) -> nn.Module:
    assert name == "resnet18_cifar"
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny network and tiny yardsticks; one call a turn."""
    monkeypatch.setattr(steps, "create_model", make_network)
    monkeypatch.setattr(roofline, "MATRIX_SIDE", {"cpu": 8})
    monkeypatch.setattr(roofline, "IMAGES", {"cpu": (1, 2, 4, 4)})
    monkeypatch.setattr(roofline, "TENSOR_BYTES", {"cpu": 1024})
    monkeypatch.setattr(throughput, "LEAST_MS", 0.0)


# The command


def bench(*arguments: str) -> int:
    return main(["bench", *SHORT, *arguments])


def test_tables_of_both_modes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench("--sparsity", "0.5,0.9", "--csv", str(tmp_path / "rows.csv")) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        "resnet18_cifar, batch 4, 2x8x8: erk masks, float32, rounds: 1, torch"
    )
    assert printed.index("training:") < printed.index("inference:")
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["mode"], r["network"], float(r["sparsity"])) for r in rows] == [
        ("training", "dense", 0.0),
        ("training", "masked", 0.5),
        ("training", "masked", 0.9),
        ("inference", "dense", 0.0),
        ("inference", "masked", 0.5),
        ("inference", "compressed", 0.5),
        ("inference", "masked", 0.9),
        ("inference", "compressed", 0.9),
    ]
    assert {row["device"] for row in rows} == {"cpu"}
    weights, others = 8 * 2 * 9 + 80, 16 + 10  # batch norm and bias stay
    assert int(rows[0]["active_weights"]) == int(rows[0]["parameters"]) == weights + others
    assert [int(r["active_weights"]) for r in rows if r["sparsity"] == "0.9"] == [22 + others] * 3
    for row in rows:
        assert float(row["images_per_second"]) == pytest.approx(4e3 / float(row["median_ms"]))
        rate = float(row["step_flops"]) / float(row["median_ms"]) * 1e3
        assert float(row["flops_per_second"]) == pytest.approx(rate)
        peak = float(row["peak_flops_per_second"])
        assert float(row["utilisation"]) == pytest.approx(rate / peak)
        share = float(row["attainable_ms"]) / float(row["median_ms"])
        assert float(row["roofline_share"]) == pytest.approx(share)
        assert row["peak_bytes"] == ""
    dense = 4 * 2 * (8 * 2 * 9 * 64 + 80)
    assert [float(row["step_flops"]) for row in rows if row["network"] == "dense"] == [
        3 * dense,
        dense,
    ]


@pytest.mark.parametrize(
    "flags",
    ["--dtype bfloat16", "--amp --amp-dtype bfloat16", "--channels-last", "--distribution uniform"],
)
def test_other_ways_to_compute(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--sparsity", "0.5", *flags.split()) == 0
    title = capsys.readouterr().out.splitlines()[0]
    for word in flags.replace("--", "").replace("-", "_").split():
        assert word in title or word in ("dtype", "amp_dtype", "distribution")


def test_settings_of_the_process_come_back() -> None:
    before = torch.get_num_threads(), torch.backends.cudnn.benchmark, selected_backend()
    flags = "--mode inference --sparsity 0 --backend reference --threads"
    assert bench(*flags.split(), str(before[0] + 1)) == 0
    assert (torch.get_num_threads(), torch.backends.cudnn.benchmark, selected_backend()) == before


BAD_INPUT = {
    "--sparsity 1": "sparsity: expected numbers in [0, 1), with commas between them, got '1'",
    "--sparsity 0.9,": "sparsity: expected numbers in [0, 1), with commas between them, got '0.9,'",
    "--sparsity nan": "sparsity: expected numbers in [0, 1), with commas between them, got 'nan'",
    "--mode train": "mode: expected some of training, inference, got 'train'",
    "--rounds 0": "rounds: expected a whole number of at least 1, got 0",
    "--threads 0": "threads: expected a whole number of at least 1, got 0",
    "--batch-size 0": "batch_size: expected a whole number of at least 1, got 0",
    "--input-size 3,32": "input_size: expected channels,height,width, got '3,32'",
    "--input-size 3,0,32": "input_size: expected channels, height and width, with commas",
    "--device tpu": "device: expected auto, cpu, cuda or cuda:N, got 'tpu'",
    "--backend nope": "backend: expected one of",
    "--amp --dtype bfloat16": "amp: expected dtype float32 with it, got bfloat16",
    "--csv nowhere/rows.csv": "csv: expected a folder, found none at nowhere",
    "--threads 100000": "threads: expected at most this machine's",
    "--sparsity 0.9999": "sparsity: 0 active weights of 224 are fewer than the 2",
}


@pytest.mark.parametrize("flags", BAD_INPUT)
def test_bad_input_is_one_line(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench(*flags.split())
    captured = capsys.readouterr()
    [line] = captured.err.splitlines()
    assert line.startswith("granet bench: error: ")
    assert BAD_INPUT[flags] in line
    assert captured.out == ""


def test_a_network_that_cannot_run_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        steps, "create_model", lambda *_, **__: nn.Sequential(nn.Flatten(), nn.Linear(5, 5))
    )
    with pytest.raises(SystemExit, match="2"):
        bench()
    assert "cannot do training on 4 images of 2x8x8: " in capsys.readouterr().err


def test_a_sparse_network_that_cannot_run_costs_its_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: nn.Module) -> nn.Module:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(steps, "compress", broken)
    assert bench("--sparsity", "0.5", "--mode", "inference") == 0
    printed = capsys.readouterr().out
    assert "compressed, 0.5: left out, RuntimeError: out of memory" in printed
    assert "\nmasked " in printed


# What is timed


def setting(**fields: object) -> Setting:
    return Setting(
        **{"model": "resnet18_cifar", "device": CPU, "sample_shape": (2, 8, 8), "batch_size": 4}
        | fields  # type: ignore[arg-type]
    )


def prepared(mode: str, network: str, **fields: object) -> tuple[nn.Module, Callable[[], None]]:
    chosen = setting(**fields)
    model = steps.make_network(chosen, network, 0.5)
    make = steps.training_step if mode == "training" else steps.inference_step
    return model, make(chosen, model, network, steps.make_batch(chosen))


@pytest.mark.parametrize("network", ["dense", "masked"])
def test_a_training_step_trains(network: str) -> None:
    model, step = prepared("training", network)
    before = [p.detach().clone() for p in model.parameters()]
    step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    for layer in masked_layers(model).values():
        assert not layer.weight[~layer.mask].any()


def called(step: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> dict[nn.Module, Tensor]:
    """The modules that a step calls, and what they return; the network itself comes last."""
    seen: dict[nn.Module, Tensor] = {}
    call = nn.Module.__call__

    def spy(module: nn.Module, *args: object) -> Tensor:
        result: Tensor = call(module, *args)
        seen[module] = result
        return result

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "__call__", spy)
        step()
    return seen


def test_networks_of_inference_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = {}
    for name in ("masked", "compressed", "dense"):
        chosen = setting()
        model = steps.make_network(chosen, name, 0.5)
        if name == "dense":
            model.load_state_dict(densify(steps.make_network(chosen, "masked", 0.5)).state_dict())
        step = steps.inference_step(chosen, model, name, steps.make_batch(chosen))
        seen = called(step, monkeypatch)
        has_norms = any(isinstance(module, nn.BatchNorm2d) for module in seen)
        assert has_norms == (name == "masked")
        outputs[name] = list(seen.values())[-1]
    assert torch.allclose(outputs["masked"], outputs["dense"], atol=1e-5)
    assert torch.allclose(outputs["masked"], outputs["compressed"], atol=1e-5)


def test_batch_norms_of_the_dense_network_are_folded() -> None:
    folded = steps._folded(make_network("resnet18_cifar", num_classes=10, in_channels=2).eval())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())

    class Untraceable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    model = Untraceable()
    assert steps._folded(model) is model


def test_random_masks_hit_the_budget_and_depend_on_the_seed() -> None:
    def masks(seed: int) -> list[Tensor]:
        model = sparsify(make_network("resnet18_cifar", num_classes=10, in_channels=2))
        mask_randomly(model, 0.75, "uniform", seed)
        return [layer.mask for layer in masked_layers(model).values()]

    first, again, other = masks(0), masks(0), masks(1)
    assert [int(mask.sum()) for mask in first] == [36, 20]
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


# Turns


def test_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    spent = {"a": 2.0, "b": 8.0}

    def elapsed(work: Callable[[], object], device: torch.device) -> float:
        start = len(log)
        work()
        return sum(spent[name] for name in log[start:])

    monkeypatch.setattr(stopwatch, "elapsed_ms", elapsed)
    calls = {name: lambda name=name: log.append(name) for name in spent}
    times = stopwatch.take_turns(calls, CPU, rounds=3, least_ms=4.0)
    assert times == {"a": [2.0] * 3, "b": [8.0] * 3}
    assert "".join(log) == "aabb" + "aab" + "baa" + "aab"


def test_ratios_are_those_of_a_round() -> None:
    assert stopwatch.median_ratio([1.0, 4.0, 9.0], [1.0, 1.0, 3.0]) == 3.0
    assert stopwatch.spread([7.0]) == (7.0, 7.0)
    assert stopwatch.spread([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == pytest.approx((2.0, 5.0))


# The roofline


def test_the_roofline() -> None:
    compute_bound, memory_bound = Work(flops=200.0, bytes=1.0), Work(flops=30.0, bytes=10.0)
    assert roofline.attainable_flops_per_second(compute_bound, RATES) == 100.0
    assert roofline.attainable_flops_per_second(memory_bound, RATES) == 30.0
    assert roofline.attainable_flops_per_second(Work(flops=1.0, bytes=0.0), RATES) == 100.0
    assert roofline.attainable_seconds([compute_bound, memory_bound], RATES) == 2.0 + 1.0
    for work in (compute_bound, memory_bound):
        seconds = roofline.attainable_seconds([work], RATES)
        assert work.flops / seconds == roofline.attainable_flops_per_second(work, RATES)


def test_rates_from_times() -> None:
    times = {
        "matrix product": [1.0, 4.0],
        "convolution": [9.0, 1.0],
        "copy": [2.0, 2.0],
        "sum": [2.0, 0.5],
    }
    yardsticks = Yardsticks(CPU, torch.float32)
    assert list(yardsticks.calls) == list(times)
    product, convolution = 2 * 8**3, 2 * 2 * 2 * 9 * 16
    assert yardsticks.rates(times) == [
        Rates(flops_per_second=product * 1e3, bytes_per_second=1024 * 1e3),
        Rates(flops_per_second=convolution * 1e3, bytes_per_second=1024 * 2e3),
    ]


def test_work_of_a_step_by_hand() -> None:
    model = sparsify(nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.Flatten(), nn.Linear(16, 3)))
    conv = masked_layers(model)["0"]
    conv.mask = torch.arange(72).view(4, 2, 3, 3) < 18  # type: ignore[assignment]
    read, written = 2 * 16, 4 * 4
    passes = [
        Work(flops=5 * 2 * 18 * 4, bytes=5 * (read + written) * 2 + 18 * 4 + 72 / 8),
        Work(flops=5 * 2 * 48, bytes=5 * (16 + 3) * 2 + 48 * 4 + 48 / 8),
    ]
    facts = {"batch_size": 5, "compute_dtype": torch.bfloat16}
    forward = roofline.work_of(model, (2, 4, 4), training=False, **facts)  # type: ignore[arg-type]
    assert forward == passes
    training = roofline.work_of(model, (2, 4, 4), training=True, **facts)  # type: ignore[arg-type]
    update = Work(flops=0.0, bytes=5 * 4 * (18 + 48 + 3))
    assert training == [passes[0]] * 3 + [passes[1]] * 3 + [update]


def test_a_dense_weight_has_no_mask_to_read() -> None:
    [work] = roofline.work_of(
        nn.Linear(4, 2), (4,), batch_size=1, training=False, compute_dtype=torch.float32
    )
    assert work == Work(flops=16.0, bytes=4 * (4 + 2 + 8))


def test_activations_of_shared_layers_and_of_attention() -> None:
    shared = nn.Linear(3, 3)
    assert measure_activations(nn.Sequential(shared, shared), (3,)) == {"0": 12}

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.attend(x, x, x)[0]
            return result

    found = measure_activations(Attention(), (5, 4))
    assert found == {"attend": 2 * 3 * 20, "attend.out_proj": 2 * 20}
    assert measure(Attention(), (5, 4)).keys() == found.keys()


def fake_turns(milliseconds: Mapping[str, Sequence[float]]) -> Callable[..., object]:
    def take_turns(
        calls: Mapping[str, Callable[[], object]], *_: object, **__: object
    ) -> Mapping[str, Sequence[float]]:
        assert set(calls) == set(milliseconds)
        return milliseconds

    return take_turns


def test_figures_from_faked_times(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {
        "dense 0.0": [4.0, 9.0, 8.0],
        "masked 0.5": [2.0, 3.0, 2.0],
        "matrix product": [1.0, 1.0, 2.0],
        "convolution": [5.0, 5.0, 5.0],
        "copy": [1.0, 2.0, 4.0],
        "sum": [9.0, 9.0, 9.0],
    }
    monkeypatch.setattr(throughput, "take_turns", fake_turns(times))
    results, failures = throughput.measure(setting(), "training", [0.5], rounds=3)
    assert failures == []
    dense, masked = results
    assert (dense.speedup, masked.speedup) == (1.0, 3.0)
    assert (masked.median_ms, masked.rounds) == (2.0, 3)
    assert masked.images_per_second == 2000.0
    assert masked.rates == Rates(flops_per_second=1024e3, bytes_per_second=1024e3)
    per_round = [
        masked.flops / rate / ms * 1e3
        for rate, ms in zip((1024e3, 1024e3, 512e3), times["masked 0.5"], strict=True)
    ]
    assert masked.utilisation == pytest.approx(sorted(per_round)[1])
    assert masked.roofline_share >= masked.utilisation  # traffic only lowers what is attainable


def test_memory_has_a_column_where_it_is_known() -> None:
    result = throughput.Result(
        mode="training", network="dense", sparsity=0.0, batch_size=8, rounds=1, median_ms=2.0,
        p20_ms=1.0, p80_ms=3.0, speedup=1.0, parameters=10, active_weights=10, flops=2e6,
        utilisation=0.5, attainable_ms=1.0, roofline_share=0.6, rates=RATES, peak_bytes=None,
    )  # fmt: skip
    header, [row] = bench_report.table([result])
    assert "peak MiB" not in header
    assert row[2:] == ["4,000", "2.00 (1.00-3.00)", "1.00", "10", "1.00", "50.0%", "60.0%"]
    header, [row] = bench_report.table([dataclasses.replace(result, peak_bytes=3 << 20)])
    assert (header[-1], row[-1]) == ("peak MiB", "3")


def test_peak_memory_is_what_was_added(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = [500]
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[-1])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.append(100))
    with throughput._counted_memory(torch.device("cuda")) as peak:
        assert peak(lambda: peaks.append(350)) == 250
    with throughput._counted_memory(CPU) as peak:
        assert peak(lambda: peaks.append(900)) is None
    assert peaks[-1] == 350  # nothing runs for a count that there is not


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MATRIX_SIDE", "IMAGES", "TENSOR_BYTES"):
        sizes = getattr(roofline, name)
        monkeypatch.setattr(roofline, name, sizes | {"cuda": sizes["cpu"]})
    path = tmp_path / "rows.csv"
    assert bench("--device", "cuda", "--sparsity", "0.5", "--amp", "--csv", str(path)) == 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["network"] for row in rows] == ["dense", "masked"] * 2
    assert all(int(row["peak_bytes"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123"), (1.5, "1.50"), (45.678, "45.7"), (1234.5, "1,234"), (0.0, "0")],
)
def test_three_digits(value: float, text: str) -> None:
    assert bench_report.digits(value) == text
    assert math.isfinite(value)


def test_a_table_that_is_there_survives_bad_input(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("precious")
    with pytest.raises(SystemExit):
        main(["bench", *["--sparsity", "0.9999", "--device", "cpu"], "--csv", str(table)])
    assert table.read_text() == "precious"
