"""The granet command: settings from every side, one-line errors, exit statuses."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from granet import cli
from granet.commands import check
from granet.commands import train as train_command
from granet.training import telemetry, train
from granet.training.checkpoint import load_checkpoint
from granet.training.config import TrainConfig, read_config_file
from tests.tiny_runs import tiny

__all__ = ["tiny"]

SHORT = shlex.split("--epochs 2 -b 256 --update-freq 2 --prune-end 4 --warmup-epochs 0.4")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def granet(*arguments: str) -> int:
    """Exit status of the command, as a shell would see it."""
    try:
        return cli.main(arguments)
    except SystemExit as exit_request:
        return int(exit_request.code or 0)


def test_train_then_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert granet("train", *SHORT, "--seed", "3") == 0
    first, *epochs, last = capsys.readouterr().out.splitlines()
    directory = Path("runs/digits-resnet_tiny-granet-3")
    assert first == (
        "granet resnet_tiny on digits: 1,590 weights, sparsity 0.5 to 0.9; "
        f"10 steps on {train.build.choose_device('auto')}; {directory}"
    )
    assert [line[:11] for line in epochs] == ["epoch 1/2  ", "epoch 2/2  "]
    assert "sparsity 0.9000, 159 of 1,590 weights active" in last
    assert {path.name for path in directory.iterdir()} >= {
        "args.yaml", "metrics.csv", "last.pt", "best.pt", "summary.yaml",
    }  # fmt: skip
    assert granet("report", "runs", "--csv", "table.csv") == 0
    assert " 159 " in capsys.readouterr().out
    assert Path("table.csv").exists()


def test_log_interval_adds_lines_within_an_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    assert granet("train", *SHORT, "--log-interval", "4") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines if "  loss " in line] == ["step 4", "step 9"]


def test_flags_win_over_the_file() -> None:
    Path("run.yaml").write_text("lr: 0.05\nseed: 7\nepochs: 2\nbatch-size: 256\nprune_end: 4\n")
    assert granet("train", "-c", "run.yaml", "--seed", "8", "--stop-after", "1") == 0
    saved = read_config_file(Path("runs/digits-resnet_tiny-granet-8/args.yaml"))
    assert (saved["lr"], saved["seed"], saved["momentum"]) == (0.05, 8, 0.9)


def stopped_run(*flags: str) -> Path:
    assert granet("train", *SHORT, "--experiment", "run", "--stop-after", "3", *flags) == 0
    return Path("runs/run")


def steps(directory: Path) -> int:
    step = load_checkpoint(directory / "last.pt").entries["progress"]["step"]
    assert isinstance(step, int)
    return step


@pytest.mark.parametrize(
    "flags",
    [
        ("--resume", "--experiment", "run"),
        ("--resume", "runs/run"),
        ("--resume", "runs/run/last.pt", "--log-interval", "3"),
        ("--resume", "runs/run", "-c", "runs/run/args.yaml", "--epochs", "2"),
    ],
    ids=" ".join,
)
def test_resume_takes_the_settings_from_the_checkpoint(
    flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = stopped_run("--lr", "0.05")
    assert capsys.readouterr().err == (
        "stopped at step 3; continue with --resume runs/run/last.pt\n"
    )
    assert granet("train", *flags) == 0
    assert "from step 3 of 10 steps" in capsys.readouterr().out
    assert steps(directory) == 10
    assert load_checkpoint(directory / "best.pt").config.lr == 0.05


def test_a_moved_run_goes_on_where_it_is() -> None:
    shutil.move(stopped_run(), "moved")
    assert granet("train", "--resume", "moved") == 0
    assert steps(Path("moved")) == 10
    assert not Path("runs/run").exists()
    assert read_config_file(Path("moved/args.yaml"))["experiment"] == "moved"


def test_a_finished_run_that_is_resumed_only_tests_again() -> None:
    assert granet("train", *SHORT) == 0
    directory = Path("runs/digits-resnet_tiny-granet-0")
    metrics = (directory / "metrics.csv").read_text()
    (directory / "summary.yaml").unlink()
    assert granet("train", "--resume") == 0
    assert (directory / "metrics.csv").read_text() == metrics
    assert telemetry.read_summary(directory / "summary.yaml").steps == 10


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command leaves on stderr."""
    capsys.readouterr()
    assert granet(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    prefix = f"granet {arguments[0]}: error: "
    assert line.startswith(prefix)
    return line.removeprefix(prefix)


BAD_INPUT = {
    "train --sparsity 1.2": "sparsity: expected a number of at least 0 and below 1, got '1.2'",
    "train --dataset cifar10 --data-dir nowhere": "nowhere",
    "train --dataset cifar10": "data_dir",
    "train -c none.yaml": "config: expected a YAML file or a recipe, found none at none.yaml",
    "train --resume nowhere": "checkpoint: expected a file, found none at nowhere",
    "train --resume": "found none at runs/digits-resnet_tiny-granet-0/last.pt",
    "train --prune-end 3 --update-freq 4": "prune_end: the ramp from step 0 to 3 holds no update",
    "train --update-freq 0": "update_freq: expected at least 1 step, got 0",
    "train --stop-after 0": "stop_after: expected at least 1 step, got 0",
    "report nowhere": "run: expected a run directory, found no last.pt in nowhere",
}


@pytest.mark.parametrize("command", BAD_INPUT)
def test_bad_input_is_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert BAD_INPUT[command] in error_of(capsys, *command.split())


def test_an_unknown_model_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from granet import models
    from granet.training import build

    monkeypatch.setattr(build, "create_model", models.create_model)
    assert "resnet_tiny" in error_of(capsys, "train", "--model", "resnet_tinny")


def test_a_second_run_in_the_same_place_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    directory = stopped_run()
    message = error_of(capsys, "train", "--experiment", "run")
    assert message.startswith(f"output: {directory} already holds a run (args.yaml)")


def test_resuming_something_else_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    directory = stopped_run()
    message = error_of(capsys, "train", "--resume", "runs/run", "--lr", "0.2")
    assert "these settings differ: lr: 0.1 in the checkpoint, 0.2 now" in message
    message = error_of(capsys, "train", "--resume", "runs/run", "--experiment", "other")
    assert message.startswith("resume: expected a checkpoint in runs/other")
    content = (directory / "last.pt").read_bytes()
    (directory / "last.pt").write_bytes(content[:1000])
    message = error_of(capsys, "train", "--resume", "runs/run")
    assert message.startswith("runs/run/last.pt: expected a whole checkpoint")


def test_an_error_in_the_middle_of_training_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*arguments: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(train.Trainer, "finish_epoch", broken)
    with pytest.raises(ValueError, match="a bug"):
        granet("train", *SHORT)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_have_their_exit_status(
    number: int,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = train.Trainer.evaluate

    def evaluate(self: train.Trainer, batches: Iterator[Any]) -> tuple[float, float]:
        if self.progress.epoch == 0:
            os.kill(os.getpid(), number)
        return original(self, batches)

    monkeypatch.setattr(train.Trainer, "evaluate", evaluate)
    assert granet("train", *SHORT, "--experiment", "run") == status
    expected = "stopped at step 5; continue with --resume runs/run/last.pt\n"
    assert capsys.readouterr().err == expected


def test_check_gives_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "run", lambda args: 1)
    assert granet("check") == 1


def test_help_shows_the_commands_and_the_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert granet("--help") == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("train", "check", "report"))
    assert granet("train", "--help") == 0
    text = capsys.readouterr().out
    assert "\nsparsity:\n  A TIME is a number of steps, or a share of the run such as 50%." in text
    assert "  granet train --resume runs/deep " in text


def test_a_progress_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    display = telemetry.make_display(epochs=2, total_steps=10, step=4)
    assert isinstance(display, telemetry.BarDisplay)
    display.step(6)
    display.running(1, 6, 0.5, 0.1)
    display.message("a line that [stays]")
    [task] = display.bar.tasks
    display.close()
    assert (task.completed, task.total, task.description) == (6, 10, "epoch 1/2")
    assert task.fields["note"] == "loss 0.5000"
    assert "a line that [stays]" in capsys.readouterr().out


def test_plain_lines_elsewhere() -> None:
    display = telemetry.make_display(epochs=2, total_steps=10, step=0)
    assert isinstance(display, telemetry.PlainDisplay)


def test_defaults_are_a_run() -> None:
    args = cli.make_parser("train").parse_args(["train"])
    assert train_command.settings(args) == (TrainConfig(), None)


WITHOUT_EXTRAS = """
import sys
extras = "matplotlib pydantic rich safetensors sklearn tensorboard torchvision yaml"
sys.modules.update(dict.fromkeys(extras.split()))
from granet.cli import main
for words in (["methods"], ["methods", "rigl"], ["recipes"], ["check", "--help"], ["--help"], ["train"]):
    try:
        print(words, main(words))
    except SystemExit as end:
        print(words, end.code)
"""


def test_what_needs_none_of_the_extras() -> None:
    """torch and numpy are enough but for training, which says what is missing."""
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS], capture_output=True, text=True, timeout=60
    )
    ends = [line for line in process.stdout.splitlines() if line.startswith("[")]
    assert ends == [
        "['methods'] 0", "['methods', 'rigl'] 0", "['recipes'] 0", "['check', '--help'] 0",
        "['--help'] 0", "['train'] 2",
    ]  # fmt: skip
    [line] = process.stderr.splitlines()
    assert line.startswith("granet train: error: ")
    assert line.endswith("pip install --no-build-isolation '.[train]' brings what is missing")


def test_a_damaged_metrics_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert granet("train", "--stop-after", "3", "--experiment", "run") == 0
    Path("runs/run/metrics.csv").write_text("epoch;step\none;two\n")
    message = error_of(capsys, "train", "--resume", "runs/run")
    assert message.startswith("runs/run/metrics.csv: expected a table with the columns epoch, step")


def test_whoever_stops_reading_gets_no_complaint() -> None:
    """`granet check | head -1`: the pipe breaks, and that is no error."""
    code = "import os, sys; from granet.cli import main; sys.exit(main(['check']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert "Error" not in process.stderr.read()
    assert process.wait() == 0


def test_a_misspelt_flag_is_one_line_with_what_is_close(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert granet("train", "--sparsty", "0.9") == 2
    message = capsys.readouterr().err
    assert message.startswith(
        "granet train: error: unknown argument '--sparsty'; close: --sparsity"
    )
    assert granet("train", "--spars", "0.9") == 2  # no abbreviation, though there is one such flag
    assert capsys.readouterr().err.startswith("granet train: error: unknown argument '--spars'")
    assert granet("check", "--sparsity", "0.9") == 2
    assert capsys.readouterr().err == "granet check: error: unknown argument '--sparsity'\n"


def test_settings_may_stand_on_both_sides_of_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[tuple[TrainConfig, object]] = []
    monkeypatch.setattr(
        train_command, "run", lambda args: taken.append(train_command.settings(args)) or 0
    )
    assert (
        cli.main(["train", "lr=0.2", "-c", "rigl", "seed=3", "--epochs", "4", "sparsity=0.8"]) == 0
    )
    [(config, _)] = taken
    assert (config.lr, config.seed, config.epochs, config.sparsity) == (0.2, 3, 4, 0.8)
    assert config.method == "rigl"
    assert cli.main(["train", "lr=0.2", "--epochs", "4", "--speed=3"]) == 2
    assert "unknown argument '--speed=3'" in capsys.readouterr().err
