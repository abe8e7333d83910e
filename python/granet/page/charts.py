"""Charts as SVG: lines over steps or epochs, and dots over layers.

Colours are classes of the page's style sheet, so that they follow the theme. A chart is drawn at the
width of a phone, and a page lays several side by side: letters keep their size.
"""

from __future__ import annotations

import bisect
import itertools
import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from granet.page.svg import Scale, add, drawing, markup, scale_of, tick_label

WIDTH, HEIGHT = 380.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 24.0, 38.0
POINTS = 400
"""Drawn of a line: more would share pixels."""
TOOLTIPS = 60
"""Of a chart, side by side."""
COLOURS = 8
"""In the style sheet; setups beyond have the same ones dashed, then dotted."""
ROW = 16.0
ABOVE = 6.0
"""The first row."""
LABEL = 138.0
"""Width of layers' names, in pixels."""
LETTERS = 21
"""That fit into it."""

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """A line, and how it is drawn."""

    setup: int
    """Index of the setup, which decides its colour."""
    label: str
    """In tooltips."""
    points: Sequence[Point]
    """In order of x. What is not finite interrupts the line."""
    role: Literal["line", "seed", "plan"] = "line"
    """A setup; one seed of it, thin; a plan, wide and pale beneath what came of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Axes:
    """What a chart of lines shows."""

    title: str
    x: str
    """Name of the horizontal axis; whole numbers."""
    y: str
    """Name and unit of the vertical axis."""
    within: tuple[float, float] = (-math.inf, math.inf)
    """Limits that no value can pass."""
    include: tuple[float, ...] = ()
    """Values of y that are shown in any case."""
    log_from: float = math.inf
    """Quotient of the largest and smallest y that makes the axis logarithmic."""
    form: str = "{:.4g}"
    """Of values of y in tooltips."""


def look(setup: int) -> str:
    """Classes of a setup's lines: a colour, and a dash where colours repeat."""
    return f"c{setup % COLOURS} d{setup // COLOURS % 3}"


def swatch(setup: int) -> Markup:
    """A setup's line, for legends and tables."""
    svg = drawing(26, 10, "")
    svg.attrib = {"viewBox": "0 0 26 10", "class": "swatch", "aria-hidden": "true"}
    add(svg, "line", class_=f"line {look(setup)}", x1=1, y1=5, x2=25, y2=5)
    return markup(svg)


def line_chart(axes: Axes, series: Sequence[Series]) -> Markup:
    """Lines over a common axis, with a tooltip for each stretch of it."""
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    x_scale = scale_of(xs, LEFT, WIDTH - RIGHT, margin=0)
    y_scale = scale_of(
        [*ys, *axes.include], HEIGHT - BOTTOM, TOP, within=axes.within, log_from=axes.log_from
    )
    svg = drawing(WIDTH, HEIGHT, _in_words(axes, series))
    _draw_grid(svg, x_scale, y_scale, axes)
    order = ("plan", "seed", "line")
    for one in sorted(series, key=lambda one: order.index(one.role)):
        _draw_series(svg, one, x_scale, y_scale)
    _draw_tooltips(svg, [one for one in series if one.role != "seed"], x_scale, axes)
    return markup(svg)


def _in_words(axes: Axes, series: Sequence[Series]) -> str:
    """The chart for those who cannot see it: where each line ends."""
    ends = [
        f"{one.label} {axes.form.format(one.points[-1][1])}"
        for one in series
        if one.points and one.role == "line"
    ]
    return f"{axes.title}: {axes.y} over {axes.x}. Last values: {'; '.join(ends) or 'none'}"


def _draw_grid(svg: ET.Element, x_scale: Scale, y_scale: Scale, axes: Axes) -> None:
    grid = add(svg, "g", class_="axes")
    for tick in y_scale.ticks(6):
        y = y_scale(tick)
        add(grid, "line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y)
        add(grid, "text", tick_label(tick), x=LEFT - 6, y=y + 4, text_anchor="end")
    bottom = HEIGHT - BOTTOM
    for tick in x_scale.ticks(6, whole=True):
        x = x_scale(tick)
        add(grid, "line", class_="tick", x1=x, x2=x, y1=bottom, y2=bottom + 4)
        add(grid, "text", tick_label(tick), x=x, y=bottom + 16, text_anchor="middle")
    add(grid, "line", class_="base", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom)
    middle = (LEFT + WIDTH - RIGHT) / 2
    add(grid, "text", axes.x, class_="name", x=middle, y=HEIGHT - 5, text_anchor="middle")
    name = axes.y + (" (log scale)" if y_scale.is_log else "")
    add(grid, "text", name, class_="name", x=4, y=12)


def _draw_series(svg: ET.Element, series: Series, x_scale: Scale, y_scale: Scale) -> None:
    classes = look(series.setup)
    pieces = [
        [(x_scale(x), y_scale(y)) for x, y in piece] for piece in _pieces(series.points, y_scale)
    ]
    path = "".join(
        "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in piece) for piece in pieces if len(piece) > 1
    )
    if path:
        add(svg, "path", class_=f"{series.role} {classes}", d=path)
    for piece in pieces:
        if len(piece) == 1:  # a line of one point would not show
            add(svg, "circle", class_=f"dot {classes}", cx=piece[0][0], cy=piece[0][1], r=2.5)


def _pieces(points: Sequence[Point], y_scale: Scale) -> list[list[Point]]:
    """Stretches of what can be drawn, thinned to `POINTS` with the last one kept."""
    every = max(math.ceil(len(points) / POINTS), 1)
    last = len(points) - 1
    pieces: list[list[Point]] = [[]]
    for index, (x, y) in enumerate(points):
        if not math.isfinite(y) or (y_scale.is_log and y <= 0):
            pieces.append([])
        elif index % every == 0 or index == last:
            pieces[-1].append((x, y))
    return [piece for piece in pieces if piece]


def _draw_tooltips(svg: ET.Element, series: Sequence[Series], x_scale: Scale, axes: Axes) -> None:
    """Invisible strips, each with the values nearest to its middle."""
    xs = sorted({x for one in series for x, _ in one.points})
    every = max(math.ceil(len(xs) / TOOLTIPS), 1)
    xs = sorted({*xs[::every], *xs[-1:]})
    middles = [(left + right) / 2 for left, right in itertools.pairwise(xs)]
    edges = [x_scale.low, *middles, x_scale.high]
    for x, left, right in zip(xs, edges, edges[1:], strict=False):
        lines = [f"{axes.x} {x:g}"]
        for one in series:
            if (y := _near(one.points, x, left, right)) is not None:
                plan = ", plan" if one.role == "plan" else ""
                lines.append(f"{one.label}{plan}: {axes.form.format(y)}")
        start, end = x_scale(left), x_scale(right)
        strip = add(
            svg, "rect", class_="strip", x=start, y=TOP, width=end - start, height=HEIGHT - BOTTOM - TOP
        )  # fmt: skip
        add(strip, "title", "\n".join(lines))


def _near(points: Sequence[Point], x: float, left: float, right: float) -> float | None:
    """The value at the point nearest to x, if it lies within the strip."""
    at = bisect.bisect_left(points, x, key=lambda point: point[0])
    nearest = min(
        points[max(at - 1, 0) : at + 1], key=lambda point: abs(point[0] - x), default=None
    )
    return nearest[1] if nearest is not None and left <= nearest[0] <= right else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Dots:
    """A setup's values, one for each layer; None where it has no such layer."""

    setup: int
    label: str
    values: Sequence[float | None]


def layer_chart(
    title: str,
    x: str,
    layers: Sequence[str],
    dots: Sequence[Dots],
    *,
    form: str,
    most: float = math.inf,
) -> Markup:
    """A row for each layer, a dot for each setup, on a logarithmic axis.

    Args:
        title: of the chart.
        x: name and unit of the axis.
        layers: names of the rows.
        dots: values; only those above 0 can be drawn.
        form: of values in tooltips.
        most: what no value can pass.
    """
    values = [value for one in dots for value in one.values if value]
    bottom = ABOVE + ROW * len(layers)
    scale = scale_of(
        values, LABEL + 8, WIDTH - RIGHT - 4, margin=0.04, within=(0, most), log_from=1.0
    )
    svg = drawing(WIDTH, bottom + BOTTOM, f"{title}: {x}, a row for each of {len(layers)} layers")
    grid = add(svg, "g", class_="axes")
    for tick in scale.ticks(6):
        add(grid, "line", class_="grid", x1=scale(tick), x2=scale(tick), y1=ABOVE, y2=bottom)
        add(grid, "text", tick_label(tick), x=scale(tick), y=bottom + 14, text_anchor="middle")
    middle = (LABEL + WIDTH - RIGHT) / 2
    name = f"{x} (log scale)" if scale.is_log else x
    add(grid, "text", name, class_="name", x=middle, y=bottom + BOTTOM - 6, text_anchor="middle")
    for row, layer in enumerate(layers):
        _draw_layer(svg, layer, ABOVE + ROW * (row + 0.5), scale, dots, row, form)
    return markup(svg)


def _draw_layer(
    svg: ET.Element,
    layer: str,
    y: float,
    scale: Scale,
    dots: Sequence[Dots],
    row: int,
    form: str,
) -> None:
    group = add(svg, "g", class_="layer")
    values = [(one, value) for one in dots if (value := one.values[row])]
    told = [f"{one.label}: {form.format(value)}" for one, value in values]
    add(group, "title", "\n".join([layer, *told]))
    add(group, "rect", class_="strip", x=0.0, y=y - ROW / 2, width=WIDTH, height=ROW)
    add(group, "text", shortened(layer, LETTERS), x=LABEL, y=y + 4, text_anchor="end")
    if len(values) > 1:
        ends = [scale(value) for _, value in values]
        add(group, "line", class_="range", x1=min(ends), x2=max(ends), y1=y, y2=y)
    elif values:
        add(group, "line", class_="range", x1=LABEL + 8, x2=scale(values[0][1]), y1=y, y2=y)
    for one, value in values:
        add(group, "circle", class_=f"dot {look(one.setup)}", cx=scale(value), cy=y, r=3.5)


def shortened(name: str, letters: int) -> str:
    """A name without its middle, where it is longer: both ends tell layers apart."""
    if len(name) <= letters:
        return name
    front = (letters - 1) // 3
    return f"{name[:front]}…{name[front + 1 - letters :]}"
