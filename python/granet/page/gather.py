"""Runs as values: what their directories hold, read and added up. Nothing here knows of drawing."""

from __future__ import annotations

import itertools
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from granet.distributions import active_budget
from granet.monitor import LayerChange
from granet.page.network import Network, read_network
from granet.training.checkpoint import load_checkpoint
from granet.training.config import TrainConfig
from granet.training.machine import AlgorithmChange, Machine, read_machines
from granet.training.planned import planned_sparsity
from granet.training.runs import RunResult, group_runs, setup_of, varying_fields
from granet.training.telemetry import (
    ALGORITHMS,
    MACHINE,
    METRICS,
    TOPOLOGY,
    EpochMetrics,
    read_rows,
)

Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """An update of the masks, all layers together. Counts are of weights."""

    step: int
    active: int
    """After it."""
    sparsity: float
    """After it."""
    pruned: int
    dropped: int
    regrown: int
    churn: float
    """Share of the active weights that had not been active before."""
    explored: float
    """Share of all weights that have been active at some time."""
    survival: float | None
    """Share of what the update before regrew that is active still; None where it regrew nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Sparsity at a step, as counted in the masks, beside the plan's."""

    step: int
    sparsity: float
    active: int
    planned_active: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run directory."""

    result: RunResult
    epochs: tuple[EpochMetrics, ...]
    updates: tuple[Update, ...]
    measured: tuple[Measured, ...]
    """After each update; of masks that never change, after each epoch; none of a dense run."""
    machines: tuple[Machine, ...]
    """One for each start; none where the run did not record it."""
    algorithms: tuple[AlgorithmChange, ...]
    checkpoint_bytes: int
    """The file's."""

    @property
    def name(self) -> str:
        """The directory's."""
        return self.result.directory.name or str(self.result.directory)

    @property
    def is_finished(self) -> bool:
        return self.result.summary is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """Runs that differ in the seed alone."""

    index: int
    """Among the setups, from 0: what it looks like in every chart."""
    label: str
    runs: tuple[Run, ...]
    network: Network
    """Of the first run."""
    planned: tuple[tuple[int, float], ...]
    """Step and sparsity: the plan of the first run, at its start, its updates and its end."""

    @property
    def config(self) -> TrainConfig:
        """Of the first run."""
        return self.runs[0].result.config

    @property
    def is_repeated(self) -> bool:
        return len(self.runs) > 1

    @property
    def is_dense(self) -> bool:
        return self.config.method == "dense"


def gather(results: Sequence[RunResult]) -> list[Setup]:
    """Everything about runs that a page shows, in order of their setups' first appearance.

    Raises:
        ValueError: a file of a run directory is damaged.
    """
    extra = varying_fields(results)
    return [
        _setup(index, label_of(group[0], extra), group)
        for index, group in enumerate(group_runs(results))
    ]


def label_of(run: RunResult, extra: Sequence[str]) -> str:
    """A setup in few words: its method, its sparsity, and the fields in which setups differ."""
    config = run.config
    parts = [config.method]
    if config.method != "dense":
        parts.append(f"{config.sparsity:.4g}")
    own = setup_of(run)
    for name in extra:
        value = own.get(name)
        if value is not None and value is not False:
            plain = name in ("dataset", "model", "opt", "backend")
            parts.append(str(value) if plain else f"{name} {value}")
    return " · ".join(parts)


def _setup(index: int, label: str, group: Sequence[RunResult]) -> Setup:
    checkpoint = load_checkpoint(group[0].checkpoint)
    network = read_network(checkpoint)
    config = group[0].config
    total = sum(layer.weights for layer in network.layers)
    sparsity_at: Callable[[int], float] | None = None
    planned: list[tuple[int, float]] = []
    if config.method != "dense":
        steps = checkpoint.entries["progress"]["total_steps"]
        shapes = [layer.shape for layer in network.layers]
        sparsity_at, updates = planned_sparsity(config, shapes, steps)
        planned = [(step, sparsity_at(step)) for step in sorted({0, *updates, steps})]
    return Setup(
        index=index,
        label=label,
        runs=tuple(_run(result, sparsity_at, total) for result in group),
        network=network,
        planned=tuple(planned),
    )


def _run(result: RunResult, sparsity_at: Callable[[int], float] | None, total: int) -> Run:
    directory = result.directory
    epochs = read_table(directory / METRICS, EpochMetrics, key="epoch")
    updates = updates_of(read_table(directory / TOPOLOGY, LayerChange, key="step"))
    measured: list[Measured] = []
    if sparsity_at is not None:
        measured = [
            Measured(
                step=step,
                sparsity=sparsity,
                active=active,
                planned_active=active_budget(sparsity_at(step), total),
            )
            for step, sparsity, active in (
                [(row.step, row.sparsity, row.active) for row in updates]
                or [(row.step, row.sparsity, row.active_weights) for row in epochs]
            )
        ]
    return Run(
        result=result,
        epochs=tuple(epochs),
        updates=tuple(updates),
        measured=tuple(measured),
        machines=tuple(read_machines(directory / MACHINE)),
        algorithms=tuple(read_table(directory / ALGORITHMS, AlgorithmChange, key="epoch")),
        checkpoint_bytes=result.checkpoint.stat().st_size,
    )


def read_table(path: Path, row: type[Row], *, key: str) -> list[Row]:
    """A CSV file as rows of a dataclass; none where a run has no such file.

    Raises:
        ValueError: it is not such a table.
    """
    if not path.is_file():
        return []
    kinds = typing.get_type_hints(row)
    columns = [field.name for field in fields(row)]  # type: ignore[arg-type]
    found = read_rows(path, columns, key)
    try:
        return [
            row(**{name: _parsed(line[name], kinds[name]) for name in columns}) for line in found
        ]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a table with the columns {', '.join(columns)}, got {error}"
        ) from None


def _parsed(text: str, kind: Any) -> Any:
    options = typing.get_args(kind) or (kind,)
    if not text and type(None) in options:
        return None
    return options[0](text)


def updates_of(rows: Sequence[LayerChange]) -> list[Update]:
    """Updates from their layers' rows, which lie in order of steps."""
    found = []
    regrown_before: dict[str, int] = {}
    for step, group in itertools.groupby(rows, key=lambda row: row.step):
        layers = list(group)
        numel = sum(row.numel for row in layers)
        active = sum(row.active for row in layers)
        regrown = sum(row.regrown for row in layers)
        survivors = sum(
            row.survival * regrown_before[row.layer]
            for row in layers
            if row.survival is not None and row.layer in regrown_before
        )
        before = sum(regrown_before.values())
        found.append(
            Update(
                step=step,
                active=active,
                sparsity=1 - active / numel,
                pruned=sum(row.pruned for row in layers),
                dropped=sum(row.dropped for row in layers),
                regrown=regrown,
                churn=regrown / max(active, 1),
                explored=sum(row.explored * row.numel for row in layers) / numel,
                survival=survivors / before if before else None,
            )
        )
        regrown_before = {row.layer: row.regrown for row in layers}
    return found
