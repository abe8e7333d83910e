"""What is written down while a run goes: its tables, TensorBoard events, and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from granet.monitor import LayerChange, Scalars, Sink
from granet.training.config import TrainConfig, write_config_file
from granet.training.machine import AlgorithmChange, AlgorithmWatch, Machine, append_machine
from granet.training.progress import Progress
from granet.training.telemetry import (
    ALGORITHMS,
    ARGS,
    MACHINE,
    METRICS,
    TOPOLOGY,
    EpochMetrics,
    Events,
    Table,
    make_display,
)


class Record:
    """Takes a run's news, and keeps nothing of them: of the processes that are not the first."""

    def begin(self) -> None:
        """Before any other."""

    def message(self, text: str) -> None:
        """A line for the user."""

    def step(self, step: int) -> None:
        """Optimizer steps so far."""

    def running(self, epoch: int, step: int, loss: float, lr: float) -> None:
        """Loss of the newest step."""

    def trained(self, epoch: int) -> None:
        """An epoch's last step is done; validation follows."""

    def epoch(self, metrics: EpochMetrics) -> None:
        """An epoch's result."""

    def sinks(self) -> list[Sink]:
        """What a monitor of the masks reports to."""
        return []

    def close(self) -> None:
        """Write what is still in memory; leave the terminal as it was."""


class RunRecord(Record):
    """Writes into the run's directory, from where the run stands, and shows it to the user.

    Args:
        directory: the run's.
        config: the run.
        progress: where it stands.
        total_steps: its length.
        machine: what computes it from here on.
        layers: those whose algorithm is noted, masked ones by name.

    Raises:
        ValueError: a table that is there cannot be continued.
    """

    def __init__(
        self,
        directory: Path,
        config: TrainConfig,
        progress: Progress,
        total_steps: int,
        *,
        machine: Machine,
        layers: Mapping[str, nn.Module],
    ) -> None:
        self._directory = directory
        self._epochs, self._total_steps, self._first_step = (
            config.epochs,
            total_steps,
            progress.step,
        )
        self._metrics = Table(directory / METRICS, EpochMetrics, key="epoch", until=progress.epoch)
        self._topology = Table(directory / TOPOLOGY, LayerChange, key="step", until=progress.step)
        self._algorithms = Table(
            directory / ALGORITHMS, AlgorithmChange, key="epoch", until=progress.epoch
        )
        self._watch = AlgorithmWatch(layers)
        write_config_file(directory / ARGS, config)
        append_machine(directory / MACHINE, machine)

    def begin(self) -> None:
        """Open the events and the display."""
        self._events = Events(self._directory, step=self._first_step)
        self._display = make_display(
            epochs=self._epochs, total_steps=self._total_steps, step=self._first_step
        )

    def message(self, text: str) -> None:
        """A line that stays."""
        self._display.message(text)

    def step(self, step: int) -> None:
        """On the terminal."""
        self._display.step(step)

    def running(self, epoch: int, step: int, loss: float, lr: float) -> None:
        """On the terminal and in the events."""
        self._display.running(epoch, step, loss, lr)
        self._events.running(step, loss, lr)

    def trained(self, epoch: int) -> None:
        """Rows of algorithms.csv: what validation will choose is another matter."""
        self._algorithms.append(*self._watch.changes(epoch))

    def epoch(self, metrics: EpochMetrics) -> None:
        """A row of metrics.csv, a line on the terminal, and the events."""
        self._metrics.append(metrics)
        self._events.epoch(metrics)
        self._display.epoch(metrics)

    def sinks(self) -> list[Sink]:
        """topology.csv and the events."""

        def append(rows: Sequence[LayerChange]) -> None:
            self._topology.append(*rows)

        writer = self._events.writer
        return [append] if writer is None else [append, Scalars(writer)]

    def close(self) -> None:
        """Close the events and the display."""
        self._events.close()
        self._display.close()
