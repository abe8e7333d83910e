"""`granet report`: a table over finished runs, with weights counted in the saved checkpoints, or a page.

Runs that differ in nothing but the seed make one row, as mean ± sample standard deviation.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from granet.commands.tables import mean_and_deviation, show
from granet.training.config import MACHINE_FIELDS, field_schemas
from granet.training.runs import (
    RunResult,
    find_runs,
    group_runs,
    read_run,
    repeated,
    setup_of,
    varying_fields,
)
from granet.training.telemetry import Summary

CAPTION = "FLOPs relative to dense: of the whole training, and of one forward pass"

COLUMNS = (
    "method", "sparsity", "test acc. %", "active weights", "train FLOPs", "infer. FLOPs",
    "seconds", "runs",
)  # fmt: skip


def table(runs: Sequence[RunResult]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the report; FLOPs are relative to dense."""
    extra = varying_fields(runs)
    rows = []
    for group in group_runs(runs):
        setup = setup_of(group[0])
        done = [run.summary for run in group if run.summary is not None]
        counted = [run.counted for run in group]
        ratios = [run.train_flops_ratio for run in group if run.train_flops_ratio is not None]
        unfinished = len(group) - len(done)
        rows.append([
            group[0].config.method,
            mean_and_deviation([count.sparsity for count in counted], "{:.4f}"),
            mean_and_deviation([summary.test_acc for summary in done], "{:.2f}"),
            *("-" if setup.get(name) is None else str(setup[name]) for name in extra),
            mean_and_deviation([count.active for count in counted], "{:,.0f}"),
            mean_and_deviation(ratios, "{:.3f}"),
            mean_and_deviation([summary.inference_flops_ratio for summary in done], "{:.3f}"),
            mean_and_deviation([run.seconds for run in group], "{:.1f}"),
            str(len(group)) + (f" ({unfinished} unfinished)" if unfinished else ""),
        ])  # fmt: skip
    return [*COLUMNS[:3], *extra, *COLUMNS[3:]], rows


def agreement(runs: Sequence[RunResult]) -> list[str]:
    """What the counts say: masks and zeros agree, or which weights are zero though active."""
    lines = []
    for run in runs:
        if stray := run.counted.zero - run.counted.inactive:
            lines.append(
                f"{run.directory}: {stray:,} active weights are exactly 0, besides the "
                f"{run.counted.inactive:,} inactive ones"
            )
    if not lines:
        zeros = ", ".join(f"{count:,}" for count in dict.fromkeys(r.counted.zero for r in runs))
        lines.append(
            "Zero weights counted in the checkpoints equal the inactive weights of their masks "
            f"and what the runs printed: {zeros}."
        )
    return lines


def write_csv(path: Path, runs: Sequence[RunResult]) -> None:
    """One row a run: the configuration, the result, the counts."""
    configs = [name for name in field_schemas() if name not in MACHINE_FIELDS]
    results = [f.name for f in dataclasses.fields(Summary)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["run", *configs, *(f"result_{name}" for name in results), "counted_zero_weights"]
        )
        for run in runs:
            summary = (
                [""] * len(results) if run.summary is None else dataclasses.astuple(run.summary)
            )
            fields = [getattr(run.config, name) for name in configs]
            writer.writerow([run.directory, *fields, *summary, run.counted.zero])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `granet report`."""
    parser.description = (
        "Compare runs in a table, or on a page; runs that differ in the seed alone share a row."
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run directory, or a folder of them"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write one row a run to FILE")
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="also write a page of curves, layers, masks and costs to FILE, which needs nothing else",
    )


def run(args: argparse.Namespace) -> int:
    """Print the report; the exit status."""
    found: dict[Path, RunResult] = {}
    for path in args.runs:
        try:
            for directory in find_runs(path):
                found.setdefault(directory.resolve(), read_run(directory))
        except FileNotFoundError as error:
            if len(args.runs) == 1:
                raise
            print(f"NOTE: {error}")  # of runs/*, where other things may lie
    runs = list(found.values())
    if not runs:
        raise FileNotFoundError("run: expected run directories, found none")
    others = repeated(runs)
    left_out = [
        f"{runs[place].directory}: left out, the same setup and seed as {other.directory}"
        for place, other in others.items()
    ]
    everything, runs = runs, [run for place, run in enumerate(runs) if place not in others]
    header, rows = table(runs)
    notes = [CAPTION, *agreement(runs), *left_out]
    show(header, rows)
    print("\n".join(notes))
    for path in (args.csv, args.html):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if args.csv is not None:
        write_csv(args.csv, everything)
        print(f"{args.csv}: {len(everything)} runs")
    if args.html is not None:
        from granet.page.document import render, write_page  # needs the train extra

        write_page(args.html, render(runs, header=header, rows=rows, notes=notes))
        print(f"{args.html}: {args.html.stat().st_size:,} bytes")
    return 0
