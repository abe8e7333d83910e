"""The harness of the GPU benchmarks, on the CPU at toy sizes."""

import contextlib
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last: `bench` is not installed, everything else is

from bench import __main__ as program  # noqa: E402
from bench import machine, records, registry, runner, targets, timing  # noqa: E402
from bench.published import PublishedMasking  # noqa: E402
from bench.yardsticks import step  # noqa: E402

CPU = torch.device("cpu")
TOY = registry.Setting(device=CPU, quick=True)
COLUMNS = (
    "group,name,variant,mode,dtype,sparsity,n_tensors,n_weights,median_ms,p20_ms,p80_ms,"
    "model_bytes,account,gbytes_per_s,ratio_to_copy,baseline,ratio_to_baseline,items_per_s,"
    "repeats,iterations,copies,device,torch,triton,cuda,driver,clocks,timestamp,note"
)

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", os.environ.get("CXX", "c++"))),
    reason="torch.compile needs a C++ compiler",
)


@pytest.fixture
def one_thread():
    """Threads on cores that other processes use make toy sizes take seconds instead of ms."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_row(build, **fields):
    fields = {"group": "step", "name": "job", "variant": "ours"} | fields
    return registry.Yardstick(build=build, **fields)


def make_case(**fields):
    return registry.Case(**{"run": lambda: None, "n_tensors": 1, "n_weights": 8} | fields)


def run_rows(rows):
    """All parts, as one list."""
    return [row for part in runner.run_rows(rows, TOY, timing.QUICK) for row in part]


def make_sample(ms, repeats=1, iterations=1):
    return timing.Sample(median_ms=ms, p20_ms=ms, p80_ms=ms, repeats=repeats, iterations=iterations)


# --- timing ---------------------------------------------------------------------------------------


def test_quantiles():
    assert timing.quantiles([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == pytest.approx((2.0, 3.5, 5.0))
    assert timing.quantiles([7.0]) == (7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="times: expected at least one"):
        timing.quantiles([])


def test_copies_fill_three_caches():
    assert timing.copies_needed(10, 100) == 30
    assert timing.copies_needed(70, 100) == 5
    assert timing.copies_needed(301, 100) == 1
    assert timing.copies_needed(10, 0) == 1


def test_measure_takes_turns_and_resets_untimed(monkeypatch):
    log = []

    def six_ms(work, device):
        log.append("start")
        work()
        return 6.0

    monkeypatch.setattr(timing, "elapsed_ms", six_ms)
    subjects = [
        timing.Subject(label="a", run=lambda: log.append("a"), reset=lambda: log.append("reset")),
        timing.Subject(label="b", run=lambda: log.append("b"), calls=3),
    ]
    outcome = timing.measure(subjects, CPU, timing.Effort(rounds=4, warmup=0, batch_ms=12.0))
    a, b = ["reset", "start", "a"], ["start", "b", "b"]  # two runs of 6 ms fill a batch of 12
    assert log[-4 * 6 :] == [*a, *b, *b, *a, *a, *b, *b, *a]
    assert outcome == {"a": make_sample(6.0, 4, 1), "b": make_sample(1.0, 4, 6)}


def test_measure_keeps_to_its_time():
    effort = timing.Effort(rounds=100, min_rounds=2, warmup=0, batch_ms=0.0, until=0.0)
    outcome = timing.measure([timing.Subject(label="a", run=lambda: None)], CPU, effort)
    assert outcome["a"].repeats == 2


def test_timing_refuses():
    subjects = [timing.Subject(label="a", run=lambda: None)] * 2
    with pytest.raises(ValueError, match="subjects: expected distinct labels"):
        timing.measure(subjects, CPU, timing.QUICK)
    with pytest.raises(ValueError, match="min_rounds: expected 1 to rounds=2, got 3"):
        timing.Effort(rounds=2, warmup=0, batch_ms=1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graph_replays_every_call():
    device = machine.find_device("cuda")
    counter = torch.zeros((), device=device)
    replay = timing.graph_replay(lambda: counter.add_(1), calls=4)
    before = counter.item()
    assert timing.elapsed_ms(replay, device) > 0
    assert counter.item() == before + 4


# --- rows -----------------------------------------------------------------------------------------


def test_rows_are_unique_and_have_their_baselines():
    rows = registry.registered()
    assert {row.group for row in rows} == set(registry.GROUPS)
    places = {(row.group, row.id, row.dtype) for row in rows}
    for row in rows:
        assert not row.baseline or (row.group, row.baseline, row.dtype) in places, row.id
    with pytest.raises(ValueError, match=r"rows: bandwidth/copy/1MiB .* is registered already"):
        registry.register(rows[0])
    with pytest.raises(ValueError, match=r"group: expected one of bandwidth, .*, got 'other'"):
        make_row(make_case, group="other")


def test_rows_are_related_to_copy_and_baseline(monkeypatch):
    times = iter([1.0, 4.0, 2.0])  # the copy, which nobody asked for, then the two rows
    monkeypatch.setattr(
        runner,
        "measure",
        lambda subjects, *_: {subject.label: make_sample(next(times)) for subject in subjects},
    )
    rows = [
        make_row(lambda _: make_case(model_bytes=8000), variant="base", baseline="job/base"),
        make_row(lambda _: make_case(items=10), baseline="job/base"),
    ]
    copy, base, ours = run_rows(rows)
    assert (copy.name, copy.ratio_to_copy) == ("copy", 1)
    assert base.gbytes_per_s == pytest.approx(8000 / 4e-3 / 1e9)
    assert base.ratio_to_copy == pytest.approx(base.gbytes_per_s / copy.gbytes_per_s)
    assert (base.ratio_to_baseline, ours.ratio_to_baseline) == (1, 0.5)
    assert (base.items_per_s, ours.items_per_s) == (None, 5000)
    assert (ours.model_bytes, ours.gbytes_per_s, ours.note) == (None, None, runner.TOY_NOTE)


def test_a_failure_costs_its_own_row(tmp_path):
    def broken(*_):
        raise RuntimeError("out of\nmemory")

    rows = [
        make_row(broken, variant="cannot_build"),
        make_row(lambda _: make_case(run=broken), variant="cannot_run"),
        make_row(lambda _: make_case(), variant="works"),
    ]
    _, first, second, third = run_rows(rows)
    for row in (first, second):
        assert (row.median_ms, row.note) == (None, "RuntimeError: out of memory")
    assert third.median_ms > 0
    path = tmp_path / "rows.csv"
    records.append_csv(path, [first, third])
    table = records.table(records.read_csv(path))
    assert "failed" in table
    assert "job/cannot_build (eager): RuntimeError: out of memory" in table


def test_what_is_left_out_has_not_failed(monkeypatch, tmp_path, capsys):
    def without_header(_):
        raise registry.UnavailableError("no such header")

    row = make_row(without_header, variant="optional")
    monkeypatch.setattr(registry, "registered", lambda: (row,))
    path = tmp_path / "rows.csv"
    arguments = ["measure", "--device", "cpu", "--quick", "--out", str(path)]
    assert program.main(arguments) == program.OK
    assert "0 failed, 1 left out" in capsys.readouterr().out
    (left_out,) = (line for line in records.read_csv(path) if line["variant"] == "optional")
    assert (left_out["median_ms"], left_out["note"]) == ("", "left out: no such header")


def test_rows_run_in_what_is_around_them():
    inside = []

    @contextlib.contextmanager
    def around():
        inside.append(True)
        yield
        inside.pop()

    case = make_case(run=lambda: inside[0], around=around, reset=lambda: inside[0])
    (_, row) = run_rows([make_row(lambda _: case)])
    assert row.median_ms > 0, row.note
    assert inside == []


def test_names_are_measured_one_after_another(monkeypatch):
    """What has been measured is there when the rest is interrupted; baselines of earlier names count."""
    shares = []

    def one_ms(subjects, device, effort):
        shares.append(effort.until)
        return {subject.label: make_sample(1.0) for subject in subjects}

    monkeypatch.setattr(runner, "measure", one_ms)
    monkeypatch.setattr(runner.time, "time", lambda: 100.0)

    def interrupted(_):
        raise KeyboardInterrupt

    rows = [
        make_row(lambda _: make_case(), name="first", variant="base"),
        make_row(lambda _: make_case(), name="second", baseline="first/base"),
        make_row(interrupted, name="third"),
    ]
    effort = dataclasses.replace(timing.QUICK, until=220.0)
    parts = runner.run_rows(rows, TOY, effort)
    assert [next(parts)[0].name for _ in range(2)] == ["copy", "first"]
    (second,) = next(parts)
    assert (second.name, second.ratio_to_baseline) == ("second", 1.0)
    with pytest.raises(KeyboardInterrupt):
        next(parts)
    assert shares == [130.0, 140.0, 160.0]


def test_a_graph_of_what_is_spent_is_restored_before_each_replay(monkeypatch):
    captured = []
    monkeypatch.setattr(runner, "graph_replay", lambda run, calls: captured.append(calls))
    restore = object()
    for reset, copies in ((None, 1), (None, 3), (restore, 1)):
        entry = runner._graph_entry(make_row(make_case), make_case(reset=reset, copies=copies))
        assert (entry.subject.reset, entry.subject.calls) == (reset, captured[-1])
    assert captured == [8, 9, 1]


def judged(target, *rows):
    columns = ("group", "name", "variant", "sparsity", "mode", "median_ms", "gbytes_per_s")
    columns += ("n_weights", "dtype")
    lines = [dict(zip(columns, (*row, "float32"), strict=True)) for row in rows]
    return targets.judge(target, lines)


def test_targets():
    """Against a row of the same mode, of another where there is none, and against reading."""
    target = targets.Target(row="job/ours", against="job/base", bound=0.5, sparsity="0.9")
    ours = ("step", "job", "ours", "0.9", "graph", "2", "", "1000000")
    base = ("step", "job", "base", "", "graph", "4", "", "1000000")
    eager = ("step", "job", "base", "", "eager", "8", "", "1000000")
    other = ("compiled", "job", "base", "", "graph", "1", "", "1000000")
    assert judged(target, other, eager, base, ours) == 0.5
    assert judged(target, other, eager, ours) == 0.25
    assert judged(target, base) is None
    assert judged(target, ours) is None
    read = targets.Target(row="job/ours", against=targets.READ, bound=2, sparsity="0.9")
    copy = ("step", "copy", "512MiB", "", "eager", "1", "1000", "0")
    assert judged(read, copy, ours) == pytest.approx(500)  # 4 MB at 1 TB/s take 4 us
    assert str(target) == "job/ours at 90% (float32, graph) <= 0.5 x job/base"


def test_targets_name_rows_that_there_are():
    rows = registry.registered()
    for target in targets.TARGETS:
        sparsity = float(target.sparsity) if target.sparsity else None
        places = [
            row
            for row in rows
            if (row.id, row.dtype, row.sparsity) == (target.row, target.dtype, sparsity)
        ]
        assert len(places) == 1, target
        assert target.mode == "eager" or places[0].graph
        if target.against != targets.READ:
            (group,) = {row.group for row in places}
            assert any((row.id, row.group) == (target.against, group) for row in rows), target
    assert targets.verdicts([]).count("not measured") == len(targets.TARGETS)


def test_csv_is_added_to_and_never_mixed(tmp_path):
    path = tmp_path / "rows.csv"
    rows = run_rows([])
    records.append_csv(path, rows)
    records.append_csv(path, rows)
    assert path.read_text().splitlines()[0] == COLUMNS
    assert len(records.read_csv(path)) == 2
    path.write_text("name,ms\n")
    with pytest.raises(ValueError, match="has other columns"):
        records.append_csv(path, rows)


def test_masked_step_is_sgd_and_masks():
    tensors = step.make_tensors("weights", 0.5, TOY)
    weights = [weight.detach().clone() for weight in tensors.weights]
    buffers = [torch.zeros_like(weight) for weight in weights]
    grads = [weight.grad for weight in tensors.weights]
    optimizer = step.make_sgd(tensors.params, "single")
    masking = PublishedMasking(tensors.weights, optimizer, tensors.masks)
    for _ in range(3):
        step.masked_step(weights, grads, buffers, [mask.float() for mask in tensors.masks])
        optimizer.step()
        masking.apply_masks()
    for weight, buffer, param in zip(weights, buffers, tensors.weights, strict=True):
        torch.testing.assert_close(weight, param.detach())
        torch.testing.assert_close(buffer, optimizer.state[param]["momentum_buffer"])


# --- the commands ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "group",
    [
        "bandwidth",
        "step",
        pytest.param("compiled", marks=[pytest.mark.slow, needs_compiler]),
        "selection",
        "training",
    ],
)
def test_measure_every_row_at_toy_size(group, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    arguments = ["measure", "--device", "cpu", "--quick", "--group", group, "--out", str(path)]
    assert program.main(arguments) == program.OK
    rows = records.read_csv(path)
    expected = [
        row for row in registry.select(registry.registered(), group=group) if not row.cuda_only
    ]
    keys = {(row["name"], row["variant"], row["dtype"]) for row in rows if row["group"] == group}
    assert keys == {(row.name, row.variant, row.dtype) for row in expected}
    for row in rows:
        milliseconds = float(row["median_ms"])
        assert 0 < float(row["p20_ms"]) <= milliseconds <= float(row["p80_ms"])
        assert (row["torch"], row["note"]) == (torch.__version__, runner.TOY_NOTE)
        if row["group"] == "training":  # batches of two images
            assert float(row["items_per_s"]) == pytest.approx(2e3 / milliseconds, rel=1e-4)
        else:
            rate = int(row["model_bytes"]) / milliseconds / 1e6
            assert float(row["gbytes_per_s"]) == pytest.approx(rate, rel=1e-4)
    assert program.main(["table", str(path)]) == program.OK
    assert runner.TOY_NOTE in capsys.readouterr().out


def test_program_refuses(tmp_path, capsys):
    arguments = ["measure", "--device", "cpu", "--only", "none/such"]
    assert program.main([*arguments, "--out", str(tmp_path / "rows.csv")]) == 2
    assert "no row matches" in capsys.readouterr().err
    assert program.main(["table", str(tmp_path / "absent.csv")]) == 2


def test_environment_names_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "OPTIONAL", ("torch", "no_such_package"))
    path = tmp_path / "environment.json"
    assert program.main(["environment", "--device", "cpu", "--out", str(path)]) == program.OK
    assert "not importable here: no_such_package" in capsys.readouterr().out
    assert json.loads(path.read_text())["missing"] == ["no_such_package"]


def test_machine_names():
    assert machine.slug("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"
    assert machine.slug("//") == "unnamed"
    assert machine.cache_bytes(CPU) == 0
