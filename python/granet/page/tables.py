"""The page's tables, as cells."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from granet.page.gather import Run, Setup
from granet.page.network import LayerAtEnd
from granet.training.runs import setup_of

NOT_RECORDED = "not recorded"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One cell."""

    text: str
    setup: int | None = None
    """Whose line stands before the text."""
    share: float | None = None
    """Of a bar beneath the text, in [0, 1]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Header and rows; the first column names what a row is about."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    setups: Sequence[int | None] = ()
    """Whose column it is, of columns that belong to setups."""


def summary(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The text report's table, a row for each setup in their order."""
    return Table(
        header=header,
        rows=[
            [Cell(text=first, setup=index), *(Cell(text=text) for text in rest)]
            for index, (first, *rest) in enumerate(rows)
        ],
    )


def runs(setups: Sequence[Setup]) -> Table:
    """One row a run: where it is, and what came of it."""
    rows = []
    for setup in setups:
        for run in setup.runs:
            result = run.result.summary
            state = (
                f"epoch {run.epochs[-1].epoch if run.epochs else 0} of {run.result.config.epochs}"
            )
            rows.append([
                Cell(text=str(run.result.directory), setup=setup.index),
                Cell(text=setup.label),
                Cell(text=str(run.result.config.seed)),
                Cell(text=f"unfinished, {state}" if result is None else f"{result.test_acc:.2f}"),
                Cell(text="–" if result is None else f"{result.val_acc:.2f}"),
                Cell(text="–" if result is None else f"{result.epoch}"),
                Cell(text=run.result.checkpoint.name),
            ])  # fmt: skip
    header = (
        "run", "setup", "seed", "test acc. %", "validation acc. %", "its epoch", "checkpoint",
    )  # fmt: skip
    return Table(header=header, rows=rows)


def settings(setups: Sequence[Setup]) -> Table:
    """What all setups share; a dense run has no say in how others are sparse."""
    fields = [setup_of(setup.runs[0].result) for setup in setups]
    names = dict.fromkeys(itertools.chain.from_iterable(fields))
    values = {name: [own[name] for own in fields if name in own] for name in names}
    shared = {name: own[0] for name, own in values.items() if len(set(map(repr, own))) == 1}
    return Table(
        header=("setting", "value"),
        rows=[
            [Cell(text=name), Cell(text=str(value))]
            for name, value in shared.items()
            if value is not None
        ],
    )


def deviations(setups: Sequence[Setup]) -> Table:
    """How far measured counts of active weights are from the plan, at most."""
    rows = []
    for setup in setups:
        found = [
            (abs(m.active - m.planned_active), m.step) for run in setup.runs for m in run.measured
        ]
        if not found:
            continue
        largest, step = max(found, key=lambda entry: entry[0])
        at = f" at step {step:,}" if largest else ""
        rows.append([
            Cell(text=setup.label, setup=setup.index),
            Cell(text=f"{len(found):,}"),
            Cell(text=f"{largest:,}{at}"),
        ])  # fmt: skip
    return Table(header=("setup", "compared", "largest difference in weights"), rows=rows)


def layers(setups: Sequence[Setup]) -> Table:
    """Active weights of each layer, of setups whose networks have the same layers."""
    rows = []
    for index, layer in enumerate(setups[0].network.layers):
        own = [setup.network.layers[index] for setup in setups]
        rows.append([
            Cell(text=layer.name),
            Cell(text="×".join(map(str, layer.shape))),
            Cell(text=f"{layer.weights:,}"),
            Cell(text=f"{layer.dense_flops / 1e6:,.2f}"),
            *(Cell(text=_active(one), share=one.share) for one in own),
        ])  # fmt: skip
    labels = [setup.label for setup in setups]
    return Table(
        header=("layer", "shape", "weights", "dense MFLOPs", *labels),
        rows=rows,
        setups=[None] * 4 + [setup.index for setup in setups],
    )


def _active(layer: LayerAtEnd) -> str:
    text = f"{layer.active:,} ({100 * layer.share:.3g} %)"
    if not layer.dead_channels:
        return text
    return f"{text}, {layer.dead_channels} dead channel{'s' if layer.dead_channels > 1 else ''}"


def algorithms(setups: Sequence[Setup]) -> Table:
    """What computed each layer, of setups whose networks have the same layers."""
    rows = []
    for layer in setups[0].network.layers:
        cells = [Cell(text=_algorithm(setup, layer.name)) for setup in setups]
        rows.append([Cell(text=layer.name), *cells])
    return Table(
        header=("layer", *(setup.label for setup in setups)),
        rows=rows,
        setups=[None, *(setup.index for setup in setups)],
    )


def _algorithm(setup: Setup, layer: str) -> str:
    """Of the setup's first run: what computed a layer first, and since when otherwise."""
    run = setup.runs[0]
    if setup.is_dense:
        return "dense"
    if not run.algorithms:
        return "dense on the masked weight" if run.machines and run.epochs else NOT_RECORDED
    changes = [change for change in run.algorithms if change.layer == layer]
    told = [name for name, _ in itertools.groupby(change.algorithm for change in changes)]
    since = [next(group).epoch for _, group in itertools.groupby(changes, lambda c: c.algorithm)]
    later = [f"{name} from epoch {epoch}" for name, epoch in zip(told[1:], since[1:], strict=True)]
    return ", ".join([*told[:1], *later]) or NOT_RECORDED


def machines(setups: Sequence[Setup]) -> Table:
    """What computed each run, and how long it took."""
    rows = []
    for setup in setups:
        for run in setup.runs:
            pairs = itertools.pairwise(run.epochs)
            seconds = [later.seconds - sooner.seconds for sooner, later in pairs]
            rows.append([
                Cell(text=run.name, setup=setup.index),
                Cell(text=_recorded(run, "device", "device_name")),
                Cell(text=_recorded(run, "backend", "cpu_kernels")),
                Cell(text=_recorded(run, "processes")),
                Cell(text=_recorded(run, "threads")),
                Cell(text=_recorded(run, "torch")),
                Cell(text=_recorded(run, "python")),
                Cell(text=f"{run.result.seconds:,.1f}"),
                Cell(text=f"{statistics.median(seconds):,.2f}" if seconds else "–"),
            ])  # fmt: skip
    header = (
        "run", "device", "backend", "processes", "CPU threads", "torch", "Python", "seconds",
        "seconds an epoch",
    )  # fmt: skip
    return Table(header=header, rows=rows)


def _recorded(run: Run, *names: str) -> str:
    """Fields of the run's machines, those of several starts after another where they differ."""
    found = []
    for machine in run.machines:
        parts = [str(value) for name in names if (value := getattr(machine, name)) is not None]
        found.append(", ".join(parts) or "none")
    return "; then ".join(name for name, _ in itertools.groupby(found)) or NOT_RECORDED


def costs(setups: Sequence[Setup]) -> Table:
    """FLOPs and bytes of each setup's first run."""
    rows = []
    for setup in setups:
        run, network = setup.runs[0], setup.network
        dense = sum(layer.dense_flops for layer in network.layers)
        sparse = sum(layer.flops for layer in network.layers)
        train = run.result.train_flops_ratio
        rows.append([
            Cell(text=setup.label, setup=setup.index),
            Cell(text="–" if train is None else f"{train:.3f}"),
            Cell(text=f"{sparse / dense:.3f}" if dense else "–"),
            Cell(text=f"{sparse / 1e6:,.2f} of {dense / 1e6:,.2f}" if dense else "–"),
            Cell(text=f"{network.dense_bytes:,}"),
            Cell(text=f"{network.active_bytes:,}"),
            Cell(text=f"{run.checkpoint_bytes:,}"),
        ])  # fmt: skip
    header = (
        "setup", "training FLOPs", "inference FLOPs", "MFLOPs of an image", "weights, bytes dense",
        "bytes active, with masks", "checkpoint file, bytes",
    )  # fmt: skip
    return Table(header=header, rows=rows)
