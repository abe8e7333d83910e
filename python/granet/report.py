"""`granet report`: a table over finished runs, with weights counted in the saved checkpoints.

Runs that differ in nothing but the seed make one row, as mean ± sample standard deviation.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from granet.checkpoint import load_checkpoint
from granet.config import MACHINE_FIELDS, SPARSE_FIELDS, TrainConfig, field_schemas
from granet.telemetry import LAST, SUMMARY, Summary, read_summary
from granet_kernels import unpack_mask

MASK_SUFFIX = "packed_mask"


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightCount:
    """Weights of the convolutions and linear layers in a checkpoint, counted one by one."""

    total: int
    """All of them."""
    zero: int
    """Those that are 0."""
    inactive: int
    """Those whose mask bit is 0; none in a dense run."""

    @property
    def active(self) -> int:
        """Those whose mask bit is 1."""
        return self.total - self.inactive

    @property
    def sparsity(self) -> float:
        """Share of inactive weights; `agreement` says whether as many are 0."""
        return self.inactive / self.total


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """A run directory, read."""

    directory: Path
    """Where it is."""
    config: TrainConfig
    """Its configuration, from the checkpoint."""
    summary: Summary | None
    """Its result; None if it has not finished."""
    counted: WeightCount
    """Weights in the checkpoint that the result is about (last.pt of an unfinished run)."""
    seconds: float
    """Time it took so far."""
    train_flops_ratio: float | None
    """FLOPs of training so far, relative to dense; None before the first step."""


def count_weights(state: Mapping[str, Tensor], source: str) -> WeightCount:
    """Count the weights of a model's state_dict.

    Masked layers are those with a mask; without any, the tensors of two dimensions or more called
    weight (convolutions and linear layers, not norms).

    Raises:
        ValueError: an inactive weight is not zero; names the layer.
    """
    total = zero = inactive = 0
    masks = {key.removesuffix(MASK_SUFFIX): key for key in state if key.endswith(MASK_SUFFIX)}
    for key, weight in state.items():
        prefix = key.removesuffix("weight")
        if prefix == key or weight.dim() < 2 or (masks and prefix not in masks):
            continue
        total += weight.numel()
        zero += int((weight == 0).sum())
        if prefix in masks:
            off = ~unpack_mask(state[masks[prefix]], weight.shape)
            inactive += int(off.sum())
            if revived := int((weight[off] != 0).sum()):
                raise ValueError(
                    f"{source}: {key}: expected zeros where the mask is off, got {revived} weights "
                    "that are not zero"
                )
    return WeightCount(total=total, zero=zero, inactive=inactive)


def find_runs(path: Path) -> list[Path]:
    """`path` itself if it is a run directory, or else the run directories anywhere below it.

    Raises:
        FileNotFoundError: there is none.
    """
    if (path / LAST).is_file():
        return [path]
    found = sorted(file.parent for file in path.rglob(LAST))
    if not found:
        raise FileNotFoundError(f"run: expected a run directory, found no {LAST} in {path}")
    return found


def read_run(directory: Path) -> RunResult:
    """Read a run directory.

    Raises:
        ValueError: the checkpoint is damaged, masks and zeros disagree, or the counts are not
            those the run printed.
    """
    has_summary = (directory / SUMMARY).is_file()
    summary = read_summary(directory / SUMMARY) if has_summary else None
    path = directory / (LAST if summary is None else summary.checkpoint)
    checkpoint = load_checkpoint(path)
    counted = count_weights(checkpoint.network, str(path))
    if summary is not None and counted.active != summary.active_weights:
        raise ValueError(
            f"{path}: expected {summary.active_weights:,} active weights as in {SUMMARY}, counted "
            f"{counted.active:,}"
        )
    flops = checkpoint.entries["flops"]
    ratio = flops["sparse_total"] / flops["dense_total"] if flops["dense_total"] else None
    return RunResult(
        directory=directory,
        config=checkpoint.config,
        summary=summary,
        counted=counted,
        seconds=summary.seconds if summary else checkpoint.entries["progress"]["seconds"],
        train_flops_ratio=summary.train_flops_ratio if summary else ratio,
    )


def setup_of(config: TrainConfig) -> dict[str, object]:
    """What makes two runs comparable: every field that matters but the seed."""
    ignored = MACHINE_FIELDS | {"seed"} | (SPARSE_FIELDS if config.method == "dense" else set())
    return {name: getattr(config, name) for name in field_schemas() if name not in ignored}


def group_runs(runs: Sequence[RunResult]) -> list[list[RunResult]]:
    """Runs of one setup together, in order of first appearance."""
    groups: dict[str, list[RunResult]] = {}
    for run in runs:
        groups.setdefault(repr(setup_of(run.config)), []).append(run)
    return list(groups.values())


def varying_fields(runs: Sequence[RunResult]) -> list[str]:
    """Fields in which setups differ, beyond method and sparsity, which have their columns."""
    setups = [setup_of(run.config) for run in runs]
    names = [name for name in field_schemas() if name not in ("method", "sparsity")]
    return [
        name
        for name in names
        # A field that dense runs do not use varies only if the others differ in it.
        if len({repr(setup[name]) for setup in setups if name in setup}) > 1
    ]


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
        setup = setup_of(group[0].config)
        done = [run.summary for run in group if run.summary is not None]
        counted = [run.counted for run in group]
        ratios = [run.train_flops_ratio for run in group if run.train_flops_ratio is not None]
        unfinished = len(group) - len(done)
        rows.append([
            group[0].config.method,
            *("-" if setup.get(name) is None else str(setup[name]) for name in extra),
            spread([count.sparsity for count in counted], "{:.4f}"),
            spread([summary.test_acc for summary in done], "{:.2f}"),
            spread([count.active for count in counted], "{:,.0f}"),
            spread(ratios, "{:.3f}"),
            spread([summary.inference_flops_ratio for summary in done], "{:.3f}"),
            spread([run.seconds for run in group], "{:.0f}"),
            str(len(group)) + (f" ({unfinished} unfinished)" if unfinished else ""),
        ])  # fmt: skip
    return [COLUMNS[0], *extra, *COLUMNS[1:]], rows


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± sample standard deviation; a single or constant value alone; `-` for none."""
    if not values:
        return "-"
    mean = form.format(statistics.fmean(values))
    if len(set(values)) == 1:
        return mean
    return f"{mean} ± {form.format(statistics.stdev(values))}"


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


def render_plain(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned by spaces, the first to the left, the rest to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        text.append("  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip())
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def show(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A rich table on a terminal, plain text elsewhere."""
    if sys.stdout.isatty():
        try:
            from rich.box import SIMPLE_HEAD
            from rich.console import Console
            from rich.table import Table
        except ModuleNotFoundError:
            pass
        else:
            rich_table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
            for column, name in enumerate(header):
                rich_table.add_column(name, justify="right" if column else "left")
            for row in rows:
                rich_table.add_row(*row)
            Console().print(rich_table)
            return
    print(render_plain(header, rows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `granet report`."""
    parser.description = "Compare runs in a table; runs that differ in the seed alone share a row."
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run directory, or a folder of them"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write one row a run to FILE")


def run(args: argparse.Namespace) -> int:
    """Print the report; the exit status."""
    runs = []
    for path in args.runs:
        try:
            runs += [read_run(directory) for directory in find_runs(path)]
        except FileNotFoundError as error:
            if len(args.runs) == 1:
                raise
            print(f"NOTE: {error}")  # of runs/*, where other things may lie
    if not runs:
        raise FileNotFoundError("run: expected run directories, found none")
    show(*table(runs))
    print(CAPTION)
    print("\n".join(agreement(runs)))
    if args.csv is not None:
        write_csv(args.csv, runs)
    return 0
