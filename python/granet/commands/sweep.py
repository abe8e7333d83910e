"""`granet sweep`: methods x sparsities x seeds, one run after another, and a table of them.

A sweep that is interrupted goes on where it was: finished runs are kept, the one under way resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from granet import recipes
from granet.commands.flags import (
    add_config_flags,
    add_flags,
    settings_in_files,
    settings_typed,
)
from granet.commands.tables import mean_and_deviation, show
from granet.methods import METHODS
from granet.paper import figure
from granet.training.checkpoint import load_checkpoint
from granet.training.config import TrainConfig, build_config, resume_conflicts
from granet.training.runs import read_run
from granet.training.stopping import Stopped
from granet.training.telemetry import LAST, SUMMARY

T = TypeVar("T")

REPORTED = "reported by others"
HEADER = (
    "method", "sparsity", "test acc. %", "seeds", "train FLOPs", "infer. FLOPs", REPORTED,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One run of a sweep."""

    method: str
    """A method, or a recipe of one."""
    sparsity: float
    config: TrainConfig


SWEPT = {"method": "--methods", "sparsity": "--sparsities", "seed": "--seeds"}
"""Settings that a run of a sweep has from the sweep, and where from."""


def points(
    base: Mapping[str, object],
    typed: Mapping[str, object],
    methods: Sequence[str],
    sparsities: Sequence[float],
    seeds: Sequence[int],
    output: str,
) -> list[Point]:
    """The runs, seeds outermost, so that an early look at a sweep sees every method; dense once a seed.

    Settings of ``base`` come first, then those of a method's recipe, then ``typed`` ones.

    Raises:
        ValueError: a method is neither one nor a recipe of one, or a setting does not fit it.
    """
    found = []
    for seed, method in itertools.product(seeds, methods):
        settings = _settings_of(method)
        for sparsity in sparsities if method != "dense" else [0.0]:
            name = f"{method}-{sparsity}-{seed}" if method != "dense" else f"dense-{seed}"
            own: dict[str, Any] = {"seed": seed, "output": output, "experiment": name}
            if method != "dense":
                own["sparsity"] = sparsity
            config = build_config(base, settings, typed, own)
            found.append(Point(method=method, sparsity=sparsity, config=config))
    return found


def _settings_of(method: str) -> dict[str, object]:
    """Of a recipe of a method, or else of a method by its name, with what it has by default."""
    own = {name for name in recipes.names() if "method" in recipes.read(name)}
    if method in own or Path(method).is_file():
        settings = recipes.read(method)
    else:
        settings = {"method": method} if method in METHODS else {}
    if "method" not in settings:
        known = ", ".join(sorted(own | METHODS.keys()))
        raise ValueError(f"methods: expected some of {known}, or files of settings, got {method!r}")
    return settings


def train_point(point: Point) -> None:
    """Train, resume, or skip what has been finished.

    Raises:
        ValueError: what has been finished had other settings.
    """
    from granet.training.train import train  # needs the train extra

    directory = point.config.run_directory
    if (directory / SUMMARY).is_file():
        done = load_checkpoint(directory / LAST).config
        if conflicts := resume_conflicts(done, point.config):
            raise ValueError(
                f"{directory}: expected a run of this sweep; settings differ: {'; '.join(conflicts)}"
            )
        return
    resume = load_checkpoint(directory / LAST) if (directory / LAST).is_file() else None
    train(point.config, resume=resume)


def table(done: Sequence[Point]) -> list[list[str]]:
    """A row for each method and sparsity: mean and deviation over seeds, and the paper's figure."""
    rows = []
    for (method, sparsity), group in _grouped(done):
        summaries = [read_run(point.config.run_directory).summary for point in group]
        results = [summary for summary in summaries if summary is not None]
        config = group[0].config
        theirs = figure(config.dataset, config.model, method, sparsity)
        rows.append(
            [
                method,
                f"{sparsity:g}",
                mean_and_deviation([result.test_acc for result in results], "{:.2f}"),
                str(len(results)),
                mean_and_deviation([result.train_flops_ratio for result in results], "{:.3f}"),
                mean_and_deviation([result.inference_flops_ratio for result in results], "{:.3f}"),
                "-" if theirs is None else str(theirs),
            ]
        )
    return rows


def _grouped(done: Sequence[Point]) -> Iterator[tuple[tuple[str, float], list[Point]]]:
    groups: dict[tuple[str, float], list[Point]] = {}
    for point in done:
        groups.setdefault((point.method, point.sparsity), []).append(point)
    yield from groups.items()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sweep's, then those of `granet train`."""
    parser.usage = "granet sweep [SWEEP] [-c NAME] [SETTINGS] [KEY=VALUE ...]"
    sweep = parser.add_argument_group("sweep")
    sweep.add_argument(
        "--methods",
        default="dense,granet,granet-dense,gmp,rigl,snip",
        metavar="NAME,NAME",
        help="methods, or recipes of them (default: dense,granet,granet-dense,gmp,rigl,snip)",
    )
    sweep.add_argument(
        "--sparsities", default="0.9,0.95,0.98", metavar="X,X", help="(default: 0.9,0.95,0.98)"
    )
    sweep.add_argument("--seeds", default="0,1,2", metavar="N,N", help="(default: 0,1,2)")
    add_config_flags(parser)
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Train what is missing, and print the table; the exit status."""
    base, typed = settings_in_files(args), settings_typed(args)
    for name in SWEPT.keys() & typed.keys():
        raise ValueError(f"{name}: a sweep takes {SWEPT[name]}, got {typed[name]!r}")
    names = base | typed
    output = Path(str(names.get("output", "runs")), str(names.get("experiment", "sweep")))
    sweep = points(
        base,
        typed,
        list(dict.fromkeys(args.methods.split(","))),
        _numbers("sparsities", args.sparsities, float, "numbers"),
        _numbers("seeds", args.seeds, int, "whole numbers"),
        str(output),
    )
    for number, point in enumerate(sweep, start=1):
        print(f"[{number}/{len(sweep)}] {point.config.run_directory}", flush=True)
        try:
            train_point(point)
        except Stopped as stop:
            print(f"{stop}; or repeat the sweep, which goes on", file=sys.stderr)
            return 128 + (stop.signal_number or 0)
    rows = table(sweep)
    notes = "FLOPs relative to dense."
    if all(row[-1] == "-" for row in rows):
        show(list(HEADER[:-1]), [row[:-1] for row in rows])
    else:
        show(list(HEADER), rows)
        notes += (
            " Reported by others for the paper's setting: from a second source, or recalled and "
            "unverified."
        )
    print(notes)
    return 0


def _numbers(name: str, text: str, kind: Callable[[str], T], expected: str) -> list[T]:
    """Each once."""
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(f"{name}: expected {expected} between commas, got {text!r}") from None
