"""Which charts a page has, each with its title and what to know about it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from markupsafe import Markup

from granet.page.charts import Axes, Dots, Point, Series, layer_chart, line_chart
from granet.page.gather import Measured, Run, Setup, Update
from granet.page.network import LayerAtEnd
from granet.training.telemetry import EpochMetrics

LOG_FROM = 50.0
"""Quotient of the largest and smallest loss from which its axis is logarithmic."""
PERCENT, POSITIVE = (0.0, 100.0), (0.0, math.inf)
"""What percentages and counts keep to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A chart with its title."""

    title: str
    chart: Markup


def curves(setups: Sequence[Setup]) -> list[Figure]:
    """Accuracies, losses and the learning rate over epochs."""

    def chart(axes: Axes, value: Callable[[EpochMetrics], float], first: int = 0) -> Figure:
        def points(run: Run) -> list[Point]:
            return [(row.epoch, value(row)) for row in run.epochs if row.epoch >= first]

        return _lines(setups, points, axes)

    def val_acc(row: EpochMetrics) -> float:
        return row.val_acc

    accuracy = partial(Axes, x="epoch", y="accuracy, %", within=PERCENT)
    loss = partial(Axes, x="epoch", y="cross-entropy", within=POSITIVE, log_from=LOG_FROM)
    rate = partial(Axes, x="epoch", y="of the epoch's last step", within=POSITIVE, include=(0.0,))
    longest = max((row.epoch for s in setups for run in s.runs for row in run.epochs), default=0)
    figures = [chart(accuracy(title="Validation accuracy"), val_acc)]
    if longest >= 4:
        title = "Validation accuracy, second half"
        figures.append(chart(accuracy(title=title), val_acc, first=longest // 2))
    return [
        *figures,
        chart(accuracy(title="Training accuracy"), lambda row: row.train_acc),
        chart(loss(title="Validation loss"), lambda row: row.val_loss),
        chart(loss(title="Training loss"), lambda row: row.train_loss),
        chart(rate(title="Learning rate"), lambda row: row.lr),
    ]


def ramp(setups: Sequence[Setup]) -> list[Figure]:
    """Sparsity beside the plan, and by how many weights it differs."""

    def points(value: Callable[[Measured], float]) -> Callable[[Run], list[Point]]:
        return lambda run: [(row.step, value(row)) for row in run.measured]

    plans = [
        Series(setup=setup.index, label=setup.label, points=setup.planned, role="plan")
        for setup in setups
        if setup.planned
    ]
    sparsity = Axes(
        title="Sparsity after each update", x="optimizer step", y="share of inactive weights",
        within=(0.0, 1.0), form="{:.6f}",
    )  # fmt: skip
    off = Axes(
        title="Measured minus planned", x="optimizer step", y="active weights",
        include=(-1.0, 1.0), form="{:+,.0f}",
    )  # fmt: skip
    return [
        _lines(setups, points(lambda row: row.sparsity), sparsity, plans),
        _lines(setups, points(lambda row: row.active - row.planned_active), off),
    ]


def dynamics(setups: Sequence[Setup]) -> list[Figure]:
    """What updates exchange, how much of the network they reach, how long it lasts."""

    def chart(axes: Axes, value: Callable[[Update], float | None]) -> Figure:
        def points(run: Run) -> list[Point]:
            found = [(row.step, value(row)) for row in run.updates]
            return [(step, y) for step, y in found if y is not None]

        return _lines(setups, points, axes)

    step = partial(Axes, x="optimizer step", include=(0.0,))
    share = partial(step, within=(0.0, 1.0))
    weights = partial(step, y="weights", within=POSITIVE, form="{:,.0f}")
    return [
        chart(share(title="Churn", y="share of the active weights"), lambda row: row.churn),
        chart(
            share(title="Exploration (ITOP rate)", y="share of all weights"),
            lambda row: row.explored,
        ),
        chart(share(title="Survival", y="share of what regrew before"), lambda row: row.survival),
        chart(weights(title="Pruned"), lambda row: row.pruned),
        chart(weights(title="Dropped"), lambda row: row.dropped),
        chart(weights(title="Regrown"), lambda row: row.regrown),
    ]


def layers(setups: Sequence[Setup]) -> list[Figure]:
    """Where active weights are, of setups whose networks have the same layers."""
    names = [layer.name for layer in setups[0].network.layers]

    def chart(
        title: str,
        x: str,
        value: Callable[[LayerAtEnd], float],
        form: str,
        most: float = math.inf,
    ) -> Figure:
        dots = [
            Dots(
                setup=setup.index,
                label=setup.label,
                values=[value(layer) for layer in setup.network.layers],
            )
            for setup in setups
        ]
        return Figure(title=title, chart=layer_chart(title, x, names, dots, form=form, most=most))

    return [
        chart("Density", "active weights, %", lambda layer: 100 * layer.share, "{:.4g} %", 100.0),
        chart("Active weights", "weights", lambda layer: layer.active, "{:,}"),
        chart("Cost", "MFLOPs of an image", lambda layer: layer.flops / 1e6, "{:.4g} MFLOPs"),
    ]


def _lines(
    setups: Sequence[Setup],
    points: Callable[[Run], list[Point]],
    axes: Axes,
    beneath: Sequence[Series] = (),
) -> Figure:
    """A line for each setup: the mean of its seeds, above each of them."""
    series = list(beneath)
    for setup in setups:
        lines = [(run, line) for run in setup.runs if (line := points(run))]
        if len(lines) > 1:
            series += [
                Series(setup=setup.index, label=run.name, points=line, role="seed")
                for run, line in lines
            ]
        if lines:
            # A run under way would cut the mean short.
            whole = [line for run, line in lines if run.is_finished]
            line = mean_of(whole or [line for _, line in lines])
            series.append(Series(setup=setup.index, label=setup.label, points=line))
    return Figure(title=axes.title, chart=line_chart(axes, series))


def mean_of(lines: Sequence[Sequence[Point]]) -> list[Point]:
    """The mean of lines where all of them are; one line as it is."""
    if len(lines) == 1:
        return list(lines[0])
    tables = [dict(line) for line in lines]
    return [
        (x, statistics.fmean(table[x] for table in tables))
        for x in tables[0]
        if all(x in table for table in tables)
    ]
