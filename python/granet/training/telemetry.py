"""What a run leaves behind and shows: its directory, metrics.csv, TensorBoard events, the terminal.

A run directory holds

    args.yaml      the configuration; `granet train -c` reads it
    machine.yaml   device, backend and versions, an entry for each start (`Machine` of machine.py)
    metrics.csv    one row an epoch (`EpochMetrics`)
    topology.csv   one row for each layer in each update (`granet.monitor.LayerChange`)
    algorithms.csv which kernels compute which layer, a row a change (`AlgorithmChange` of machine.py)
    events.out.*   the same numbers for TensorBoard, and the running loss
    last.pt        the newest checkpoint (granet.training.checkpoint)
    best.pt        the checkpoint of the epoch that was best on the validation images, among those
                   that ended at final sparsity and not right after an update of the masks
    summary.yaml   the result (`Summary`), once the run has finished
"""

from __future__ import annotations

import csv
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from granet.files import replacing

ARGS, METRICS, TOPOLOGY, SUMMARY = "args.yaml", "metrics.csv", "topology.csv", "summary.yaml"
MACHINE, ALGORITHMS = "machine.yaml", "algorithms.csv"
LAST, BEST = "last.pt", "best.pt"


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochMetrics:
    """A row of metrics.csv. Accuracies are percentages; losses are means per image."""

    epoch: int
    """Epochs finished, from 1."""
    step: int
    """Optimizer steps so far."""
    lr: float
    """Learning rate of the epoch's last step."""
    train_loss: float
    """Mean over the epoch's batches, each before its own step; with label smoothing."""
    train_acc: float
    """Of the same forward passes, augmented images."""
    val_loss: float
    """Without label smoothing."""
    val_acc: float
    """On the validation images."""
    sparsity: float
    """Share of inactive weights, counted in the masks; 0 for a dense run."""
    active_weights: int
    """Active weights of the convolutions and linear layers."""
    seconds: float
    """Training and validation since the run began, interruptions left out."""
    train_flops_ratio: float
    """Training FLOPs so far, relative to training densely as long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The result of a finished run, in summary.yaml. Accuracies are percentages."""

    checkpoint: str
    """File the test accuracy belongs to: best.pt, or last.pt if no epoch qualified."""
    epoch: int
    """Epoch of that checkpoint."""
    val_acc: float
    """Its accuracy on the validation images, by which it was chosen."""
    test_acc: float
    """Its accuracy on the test images, which no choice depends on."""
    test_loss: float
    """Its mean cross-entropy on the test images."""
    sparsity: float
    """Share of inactive weights, counted in its masks."""
    active_weights: int
    """Active weights of its convolutions and linear layers."""
    total_weights: int
    """All weights of the same layers."""
    steps: int
    """Optimizer steps of the whole run."""
    inference_flops_ratio: float
    """FLOPs of its forward pass, relative to the dense network's."""
    train_flops_ratio: float
    """FLOPs of the whole training run, relative to training densely."""
    seconds: float
    """Training and validation, interruptions left out."""


def create_run_directory(path: Path) -> None:
    """Make the directory of a new run.

    Raises:
        ValueError: it already holds a run.
    """
    for name in (ARGS, METRICS, LAST):
        if (path / name).exists():
            raise ValueError(
                f"output: {path} already holds a run ({name}); continue it with --resume, or "
                "choose another --experiment or --output"
            )
    path.mkdir(parents=True, exist_ok=True)


def write_summary(path: Path, summary: Summary) -> None:
    """Write summary.yaml: after a crash it is there, whole, or not."""
    import yaml

    text = yaml.safe_dump(dataclasses.asdict(summary), sort_keys=False)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_summary(path: Path) -> Summary:
    """Read summary.yaml; ValueError if it does not hold a summary's fields."""
    import yaml

    try:
        summary = Summary(**yaml.safe_load(path.read_text(encoding="utf-8")))
    except (TypeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: expected a summary of a granet run: {error}") from None
    if summary.checkpoint not in (BEST, LAST):
        raise ValueError(f"{path}: expected {BEST} or {LAST}, got {summary.checkpoint!r}")
    for field in dataclasses.fields(Summary):
        value = getattr(summary, field.name)
        if field.name != "checkpoint" and (
            isinstance(value, bool) or not isinstance(value, int | float)
        ):
            raise ValueError(f"{path}: {field.name}: expected a number, got {value!r}")
    return summary


def read_rows(path: Path, columns: list[str], key: str) -> list[dict[str, str]]:
    """The rows of a table that was perhaps edited by hand, or cut short by a crash."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        whole = [row for row in rows if None not in row.values()]
        for row in whole:
            int(row[key])
    except (OSError, UnicodeDecodeError, ValueError, KeyError, csv.Error) as error:
        expected = f"a table with the columns {', '.join(columns)}"
        raise ValueError(f"{path}: expected {expected}, got an unreadable one ({error})") from None
    return whole


class Table:
    """A CSV file of dataclass rows, opened where a run stands, so that no row appears twice."""

    def __init__(self, path: Path, row: type, *, key: str, until: int) -> None:
        """Keep the rows there that have at most ``until`` in the column ``key``."""
        self.path = path
        columns = [field.name for field in dataclasses.fields(row)]
        rows: list[dict[str, str]] = []
        if path.exists():
            rows = read_rows(path, columns, key)
        with (
            replacing(path) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row for row in rows if int(row[key]) <= until)

    def append(self, *rows: Any) -> None:
        """Add rows."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(dataclasses.astuple(row) for row in rows)


class Display(Protocol):
    """Shows a run while it goes."""

    def message(self, text: str) -> None:
        """A line that stays."""

    def step(self, step: int) -> None:
        """Optimizer steps so far."""

    def running(self, epoch: int, step: int, loss: float, lr: float) -> None:
        """Loss of the newest step, every `log_interval` steps."""

    def epoch(self, metrics: EpochMetrics) -> None:
        """An epoch's result."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class PlainDisplay:
    """Lines that read well in a log file."""

    def __init__(self, *, epochs: int, stream: TextIO | None = None) -> None:
        self.epochs = epochs
        self.stream = stream

    def message(self, text: str) -> None:
        print(text, file=self.stream or sys.stdout, flush=True)

    def step(self, step: int) -> None:
        pass

    def running(self, epoch: int, step: int, loss: float, lr: float) -> None:
        self.message(f"epoch {epoch}/{self.epochs}  step {step}  loss {loss:.4f}  lr {lr:.5f}")

    def epoch(self, metrics: EpochMetrics) -> None:
        self.message(epoch_line(metrics, self.epochs))

    def close(self) -> None:
        pass


class BarDisplay:
    """A progress bar over the run's steps, the epochs' lines above it."""

    def __init__(self, *, epochs: int, total_steps: int, step: int) -> None:
        from rich import progress

        self.epochs = epochs
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[note]}"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
        )
        self.task = self.bar.add_task("training", total=total_steps, completed=step, note="")
        self.bar.start()

    def message(self, text: str) -> None:
        self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, step: int) -> None:
        self.bar.update(self.task, completed=step)

    def running(self, epoch: int, step: int, loss: float, lr: float) -> None:
        self.bar.update(
            self.task, description=f"epoch {epoch}/{self.epochs}", note=f"loss {loss:.4f}"
        )

    def epoch(self, metrics: EpochMetrics) -> None:
        self.message(epoch_line(metrics, self.epochs))

    def close(self) -> None:
        self.bar.stop()


def epoch_line(metrics: EpochMetrics, epochs: int) -> str:
    """An epoch's result as one line of fixed-width columns."""
    width = len(str(epochs))
    return (
        f"epoch {metrics.epoch:>{width}}/{epochs}"
        f"  train {metrics.train_loss:.4f} {metrics.train_acc:6.2f} %"
        f"  val {metrics.val_loss:.4f} {metrics.val_acc:6.2f} %"
        f"  sparsity {metrics.sparsity:.4f}  {metrics.seconds:.1f} s"
    )


def make_display(*, epochs: int, total_steps: int, step: int) -> Display:
    """A progress bar on a terminal, plain lines elsewhere (or where rich is not installed)."""
    if sys.stdout.isatty():
        try:
            return BarDisplay(epochs=epochs, total_steps=total_steps, step=step)
        except ModuleNotFoundError:
            pass
    return PlainDisplay(epochs=epochs)


class Events:
    """TensorBoard events, against the step. Without tensorboard installed it records nothing."""

    def __init__(self, directory: Path, *, step: int) -> None:
        self.writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError:
            return
        # On resume TensorBoard forgets what the interrupted run wrote after its checkpoint.
        self.writer = SummaryWriter(str(directory), purge_step=step + 1 if step else None)

    def running(self, step: int, loss: float, lr: float) -> None:
        """The newest step's loss and learning rate."""
        if self.writer is not None:
            self.writer.add_scalar("step/loss", loss, step)
            self.writer.add_scalar("step/lr", lr, step)

    def epoch(self, metrics: EpochMetrics) -> None:
        """Every column of the epoch's row."""
        if self.writer is not None:
            for name, value in dataclasses.asdict(metrics).items():
                if name != "step":
                    self.writer.add_scalar(f"epoch/{name}", value, metrics.step)

    def close(self) -> None:
        """Write what is still in memory."""
        if self.writer is not None:
            self.writer.close()
