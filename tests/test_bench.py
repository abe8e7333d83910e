"""The harness on the CPU at toy sizes, and the published procedure on vectors worked by hand."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last: `bench` is not installed, everything else is

from bench import __main__ as program  # noqa: E402
from bench import machine, records, registry, resnet50, runner, targets, timing  # noqa: E402
from bench.published import PublishedMasking, prune_bytes, step_bytes, update_bytes  # noqa: E402
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


def make_sample(ms, repeats=1, iterations=1):
    return timing.Sample(median_ms=ms, p20_ms=ms, p80_ms=ms, repeats=repeats, iterations=iterations)


# --- the published procedure ----------------------------------------------------------------------


def published(weights, masks, *, grads=None, edition="cifar"):
    """Momentum is 1 everywhere, whatever the mask."""
    params = [nn.Parameter(torch.tensor(weight)) for weight in weights]
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    for i, param in enumerate(params):
        optimizer.state[param]["momentum_buffer"] = torch.ones_like(param)
        param.grad = None if grads is None else torch.tensor(grads[i])
    masks = [torch.tensor(mask, dtype=torch.bool) for mask in masks]
    return PublishedMasking(params, optimizer, masks, edition=edition)


def momenta(masking):
    return [masking.optimizer.state[param]["momentum_buffer"].tolist() for param in masking.params]


def masks_of(masking):
    assert all(mask.dtype == torch.float32 for mask in masking.masks)
    return [mask.tolist() for mask in masking.masks]


def test_published_masking_reallocates_weight_and_momentum():
    masking = published([[1.0, -2.0, 3.0]], [[1, 0, 1]])
    state = masking.optimizer.state[masking.params[0]]
    weight, momentum = masking.params[0].data, state["momentum_buffer"]
    masking.apply_masks()
    assert masking.params[0].tolist() == [1, 0, 3]
    assert momenta(masking) == [[1, 0, 1]]
    assert masking.params[0].data_ptr() != weight.data_ptr()
    assert state["momentum_buffer"].data_ptr() != momentum.data_ptr()


@pytest.mark.parametrize(
    ("edition", "masks"),
    [
        ("cifar", [[1, 0, 0, 0], [1, 1, 0, 0]]),  # strictly above the 4th largest, 3: three stay
        ("imagenet", [[1, 1, 0, 0], [1, 1, 0, 0]]),
    ],
)
def test_published_prune_is_global(edition, masks):
    weights = [[4.0, -3.0, 2.0, 1.0], [-8.0, 7.0, 0.5, 0.0]]
    masking = published(weights, [[1] * 4] * 2, edition=edition)
    masking.prune(0.5)
    assert masks_of(masking) == masks
    assert masking.params[0].tolist() == [4, -3 * masks[0][1], 0, 0]
    assert momenta(masking) == masks


@pytest.mark.parametrize(("edition", "mask"), [("cifar", [1, 0, 0, 0]), ("imagenet", [1, 1, 1, 1])])
def test_published_prune_when_the_threshold_is_zero(edition, mask):
    masking = published([[5.0, 0.0, 0.0, 0.0]], [[1, 0, 0, 0]], edition=edition)
    masking.prune(0.5)
    assert masks_of(masking) == [mask]


@pytest.mark.parametrize("edition", ["cifar", "imagenet"])
def test_published_drop_and_regrow(edition):
    # 5 active, a third of them: ceil(5 / 3) = 2 dropped, |1| and |-2|. The largest |gradient| where
    # the mask is then zero: 9 (long inactive, regrows at 0) and 7 (just dropped, keeps its -2 and
    # its momentum).
    weights = [[5.0, 1.0, -2.0, 4.0, 3.0, 0.0, 0.0, 0.0]]
    grads = [[99.0, 2.0, -7.0, 0.0, 50.0, 3.0, -9.0, 1.0]]
    masking = published(weights, [[1, 1, 1, 1, 1, 0, 0, 0]], grads=grads, edition=edition)
    masking.apply_masks()
    masking.drop_and_regrow(1 / 3)
    masking.apply_masks()
    assert masks_of(masking) == [[1, 0, 1, 1, 1, 0, 1, 0]]
    assert masking.params[0].tolist() == [5, 0, -2, 4, 3, 0, 0, 0]
    assert momenta(masking) == [[1, 0, 1, 1, 1, 0, 0, 0]]


def test_published_regrowth_loses_density_without_gradients():
    # Sorting equal scores, the choice falls on active weights as soon as they come first.
    masking = published([[4.0, 3.0, 2.0, 1.0]], [[1] * 4], grads=[[0.0] * 4])
    masking.drop_and_regrow(0.5)
    assert masking.active_counts()[0] < 4


def test_published_update_prunes_first():
    weights = [[4.0, 3.0, 2.0, 1.0], [8.0, 7.0, 6.0, 5.0]]
    grads = [[0.0, 0.0, 9.0, 0.0], [1.0, 2.0, 3.0, 4.0]]
    masking = published(weights, [[1] * 4] * 2, grads=grads, edition="imagenet")
    masking.update(0.5, 0.25)
    # Pruning leaves the second layer alone; one of it is dropped, 5, and regrown, with its value.
    # The first layer is empty and never regrows, whatever its gradients.
    assert masks_of(masking) == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert [param.tolist() for param in masking.params] == [[0, 0, 0, 0], [8, 7, 6, 5]]


def test_published_refuses():
    with pytest.raises(ValueError, match="masks: expected 1, one a parameter, got 0"):
        published([[1.0]], [])
    with pytest.raises(ValueError, match="edition: expected 'cifar' or 'imagenet', got 'mnist'"):
        published([[1.0]], [[1]], edition="mnist")
    with pytest.raises(ValueError, match="sparsity: expected to leave at least one weight"):
        published([[1.0]], [[1]]).prune(0.5)


def test_byte_accounts():
    assert (step.FUSED, step.UNFUSED, step.MASKING) == (20, 44, 24)
    assert step_bytes(10) == 240
    assert prune_bytes(10) == 10 * (8 + 8 + 20 + 8 + 5 + 5 + 24 + 4)
    drop_regrow = 4 + 5 + 8 + 16 + 5 + 1 + 8 + 17 + 8 + 16 + 5
    assert update_bytes(10) == prune_bytes(10) + 10 * drop_regrow + 240


# --- the network ----------------------------------------------------------------------------------


def shapes_of(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_resnet50_shapes():
    for shapes, tensors, numbers in (
        (resnet50.weight_shapes(), 54, 25_502_912),
        (resnet50.parameter_shapes(), 161, 25_557_032),
    ):
        assert len(shapes) == tensors
        assert sum(math.prod(shape) for shape in shapes) == numbers


def test_resnet50_is_torchvisions():
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        assert shapes_of(resnet50.ResNet()) == shapes_of(models.resnet50())
    small = models.resnet.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=7).eval()
    same = resnet50.ResNet(resnet50.Size(blocks=(1, 1, 1, 1), classes=7)).eval()
    same.load_state_dict(small.state_dict())
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(same(images), small(images))


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
    effort = timing.Effort(rounds=100, min_rounds=2, warmup=0, batch_ms=0.0, seconds=0.0)
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
    copy, base, ours = runner.run_rows(rows, TOY, timing.QUICK)
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
    _, first, second, third = runner.run_rows(rows, TOY, timing.QUICK)
    for row in (first, second):
        assert (row.median_ms, row.note) == (None, "RuntimeError: out of memory")
    assert third.median_ms > 0
    path = tmp_path / "rows.csv"
    records.append_csv(path, [first, third])
    table = records.table(records.read_csv(path))
    assert "failed" in table
    assert "job/cannot_build (eager): RuntimeError: out of memory" in table


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
    rows = runner.run_rows([], TOY, timing.QUICK)
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
    expected = registry.select(registry.registered(), group=group)
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


def started(*arguments, **environment):
    environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = ["bash", "bench/gpu_suite.sh", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **streams)


def suite(*arguments, **environment):
    process = started(*arguments, **environment)
    stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def test_suite_says_that_there_is_no_gpu(tmp_path):
    answer = suite(str(tmp_path / "out"), CUDA_VISIBLE_DEVICES="")
    assert (answer.returncode, answer.stdout) == (3, "")
    assert "no CUDA device" in answer.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "add --quick"),
        (["--device"], "an option lacks its value"),
        (["--device", "tpu"], "--device: expected cuda or cpu, got 'tpu'"),
        (["--stages", "biuld"], "--stages: expected some of environment build"),
        (["one", "two"], "expected one OUT"),
    ],
)
def test_suite_refuses(arguments, message):
    answer = suite(*arguments)
    assert answer.returncode == 2
    assert message in answer.stderr


def test_suite_summarizes_when_interrupted(tmp_path):
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "granet.py").write_text("import time\nprint('sleeping', flush=True)\ntime.sleep(100)\n")
    out = tmp_path / "out"
    stages = ["--stages", "check,bandwidth"]
    process = started("--device", "cpu", "--quick", *stages, str(out), PYTHONPATH=str(fake))
    try:
        log = out / "suite.log"
        while not (log.exists() and "sleeping" in log.read_text()) and process.poll() is None:
            time.sleep(0.1)
        process.terminate()
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    with (out / "stages.csv").open() as file:
        outcomes = [(row["stage"], row["outcome"]) for row in csv.DictReader(file)]
    assert outcomes == [("check", "interrupted")]
    summary = (out / "summary.txt").read_text()
    assert summary in stdout
    assert "interrupted" in summary
    assert "sleeping" in summary


def test_suite_goes_on_after_a_failure(tmp_path):
    out, fake = tmp_path / "out", tmp_path / "fake"
    fake.mkdir()
    (fake / "granet.py").write_text("raise SystemExit('planted failure')\n")
    stages = ["--stages", "check,bandwidth"]
    answer = suite("--device", "cpu", "--quick", *stages, str(out), PYTHONPATH=str(fake))
    assert answer.returncode == 1, answer.stderr
    with (out / "stages.csv").open() as file:
        outcomes = [(row["stage"], row["outcome"]) for row in csv.DictReader(file)]
    assert outcomes == [("check", "failed"), ("bandwidth", "passed")]
    files = ["stages.csv", "suite.log", "summary.txt", "yardsticks.csv"]
    assert sorted(path.name for path in out.iterdir()) == files
    summary = (out / "summary.txt").read_text()
    assert summary in answer.stdout
    assert "planted failure" in summary
    assert "512MiB" in summary
