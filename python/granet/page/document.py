"""The page: values, charts and tables put into one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from granet.page import figures, tables
from granet.page.charts import swatch
from granet.page.gather import Setup, gather
from granet.page.network import SHOWN, SHOWN_LINEAR
from granet.page.pictures import data_uri
from granet.training.runs import RunResult

PICTURE = 150
"""Pixels of the screen that a mask picture may be wide; each of its own is a whole number of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Setups whose networks have the same layers."""

    name: str
    setups: Sequence[Setup]
    charts: Sequence[figures.Figure]
    layers: tables.Table
    algorithms: tables.Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """A mask picture, as a browser shows it."""

    layer: str
    note: str
    uri: str
    width: int
    height: int


def render(
    results: Sequence[RunResult],
    *,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
) -> str:
    """Runs as one HTML page that refers to nothing outside itself; the same runs give the same text.

    Args:
        results: the runs.
        header: of the text report's table.
        rows: of the same, one for each setup, in order of first appearance.
        notes: what the text report says beneath its table.

    Raises:
        ValueError: a file of a run directory is damaged.
    """
    setups = gather(results)
    sparse = [setup for setup in setups if setup.planned]
    dynamic = [setup for setup in setups if any(run.updates for run in setup.runs)]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("granet.page", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sheet = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(
        css=Markup(sheet),  # ours
        swatch=swatch,
        title=title_of(setups),
        facts=facts(setups),
        setups=setups,
        summary=tables.summary(header, rows),
        notes=notes,
        runs=tables.runs(setups),
        settings=tables.settings(setups),
        curves=figures.curves(setups),
        ramp_setups=sparse,
        ramp=figures.ramp(sparse),
        deviations=tables.deviations(setups),
        architectures=architectures(setups),
        dynamic_setups=dynamic,
        dynamics=figures.dynamics(dynamic),
        shown=SHOWN,
        shown_linear=SHOWN_LINEAR,
        pictures=[(setup, images(setup)) for setup in setups if setup.network.pictures],
        machines=tables.machines(setups),
        costs=tables.costs(setups),
    )


def title_of(setups: Sequence[Setup]) -> str:
    """What was trained: methods, on which networks and data sets."""

    def some(values: Sequence[str]) -> str:
        found = list(dict.fromkeys(values))
        return ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")

    methods = some([setup.config.method for setup in setups])
    models = some([setup.config.model for setup in setups])
    return f"{methods}: {models} on {some([setup.config.dataset for setup in setups])}"


def facts(setups: Sequence[Setup]) -> str:
    """How many runs there are."""
    runs = [run for setup in setups for run in setup.runs]
    unfinished = sum(not run.is_finished for run in runs)

    def count(number: int, noun: str) -> str:
        return f"{number} {noun}{'' if number == 1 else 's'}"

    text = f"{count(len(runs), 'run')} of {count(len(setups), 'setup')}"
    return text + (f", {unfinished} unfinished" if unfinished else "")


def architectures(setups: Sequence[Setup]) -> list[Architecture]:
    """Setups by the layers of their networks, in order of first appearance."""
    groups: dict[object, list[Setup]] = {}
    for setup in setups:
        key = tuple((layer.name, layer.shape) for layer in setup.network.layers)
        groups.setdefault((setup.config.model, key), []).append(setup)
    return [
        Architecture(
            name=f"{group[0].config.model}, {len(group[0].network.layers)} layers",
            setups=group,
            charts=figures.layers(group),
            layers=tables.layers(group),
            algorithms=tables.algorithms(group),
        )
        for group in groups.values()
    ]


def images(setup: Setup) -> list[Image]:
    """The mask pictures of a setup's first run."""
    found = []
    for picture in setup.network.pictures:
        height, width = picture.levels.shape
        scale = max(PICTURE // max(height, width), 2)
        note = (
            f"{'×'.join(map(str, picture.layer.shape))}, {100 * picture.layer.share:.3g} % active"
        )
        found.append(
            Image(
                layer=picture.layer.name,
                note=note,
                uri=data_uri(picture),
                width=scale * width,
                height=scale * height,
            )
        )
    return found


def write_page(path: Path, page: str) -> None:
    """Write a page, in the bytes that it has everywhere."""
    path.write_bytes(page.encode("utf-8"))
