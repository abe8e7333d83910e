"""The tables of README.md and docs/performance.md that CSV files fill: ``python -m bench.cpu.summary``."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.cpu.effort import SPARSITIES
from bench.cpu.rows import MISS
from bench.cpu.targets import DENSE, SPARSEPROP

RESULTS = Path(__file__).parents[1] / "results"
ZEN_4 = RESULTS / "cpu-amd-epyc-family-25"
"""README.md's machine."""
XEON = RESULTS / "cpu-intel-r-xeon-r-processor-model-207"
MACHINES = (ZEN_4, XEON)
FILES = ("cpu.csv", "cpu-avx2.csv")
"""With AVX-512, and with AVX2 alone; a cell has a number of each."""

ERK = "erk"
CONV, LINEAR, BATCH_1 = "geometric mean of 24", "geometric mean of 8", "geometric mean of 14"
RESNET18, RESNET50 = "ResNet-18, 32x32, batch 64", "ResNet-50, 224x224, batch 16"
ONE_IMAGE = "ResNet-50, 224x224, batch 1"
BOTH, STEP, TRAINED, COMPRESSED = (
    "forward+backward",
    "training step",
    "sparsify, MaskedSGD",
    "compress",
)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a table: what is measured, at each sparsity."""

    label: str
    group: str
    case: str
    measure: str
    threads: int
    ours: str
    baseline: str = DENSE
    floor: str = ""

    def rows(self, measured: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
        """Of one instruction set, by sparsity; uniform masks."""
        wanted = {
            name: str(getattr(self, name))
            for name in ("group", "case", "measure", "threads", "ours", "baseline")
        }
        of_this = [row for row in measured if wanted.items() <= row.items() and row["masks"] != ERK]
        by_sparsity = {float(row["sparsity"]): row for row in of_this if row["sparsity"]}
        return [by_sparsity[sparsity] for sparsity in SPARSITIES]


def _layers(label: str, ours: str, threads: int, floor: str, **options: str) -> Line:
    group, case = ("conv", CONV) if ours == "MaskedConv2d" else ("linear", LINEAR)
    measure = options.pop("measure", BOTH)
    return Line(label, group, case, measure, threads, ours, floor=floor, **options)


SPEEDUPS = (
    _layers(
        "`MaskedConv2d` forward, 24 ResNet layers, geometric mean, 1 thread",
        *("MaskedConv2d", 1, "1.5, 2.5, 3.8, 6.3"),
        measure="forward",
    ),
    _layers("the same, 2 threads", "MaskedConv2d", 2, "the same", measure="forward"),
    _layers("forward and backward, 1 thread", "MaskedConv2d", 1, "1.2, 2.2, 4, 7"),
    _layers("the same, 2 threads", "MaskedConv2d", 2, "the same"),
    _layers(
        "… against SparseProp 0.1.14, forward and backward, 1 thread",
        *("MaskedConv2d", 1, "1.3 on each layer"),
        baseline=SPARSEPROP,
    ),
    Line(
        "one image, forward, 14 layers, 1 thread",
        *("conv-batch-1", BATCH_1, "inference", 1, "MaskedConv2d"),
    ),
    _layers(
        "`MaskedLinear` forward and backward, 8 layers, 1 thread",
        *("MaskedLinear", 1, "1.51, 2.76, 4.76, 8.69"),
    ),
    _layers("the same, 2 threads", "MaskedLinear", 2, "the same"),
    _layers("… against SparseProp 0.1.14, 1 thread", "MaskedLinear", 1, "1.2", baseline=SPARSEPROP),
    _layers("… the same, 2 threads", "MaskedLinear", 2, "1.2", baseline=SPARSEPROP),
    Line(
        "ResNet-18, 32×32, batch 64: training step, 1 thread",
        *("training", RESNET18, STEP, 1, TRAINED),
        floor="1.1, 1.8, 3, 4.5",
    ),
    Line("the same, 2 threads", "training", RESNET18, STEP, 2, TRAINED, floor="the same"),
    Line(
        "ResNet-50, 224×224, batch 16: training step, 2 threads",
        *("training", RESNET50, STEP, 2, TRAINED),
    ),
    Line(
        "ResNet-18, batch 64: inference, `compress`, 2 threads",
        *("inference", RESNET18, "inference", 2, COMPRESSED),
    ),
    Line(
        "ResNet-50, batch 16: inference, `compress`, 2 threads",
        *("inference", RESNET50, "inference", 2, COMPRESSED),
    ),
    Line(
        "ResNet-50, one image: inference, `compress`, 2 threads",
        *("inference", ONE_IMAGE, "inference", 2, COMPRESSED),
    ),
)

ACCOUNTS = tuple(
    Line(label, f"{group}-account", case, measure, threads, "account")
    for name, group, case, measure in (
        ("convolutions forward", "conv", CONV, "forward"),
        ("forward and backward", "conv", CONV, BOTH),
        ("linear, forward and backward", "linear", LINEAR, BOTH),
        ("ResNet-18's training step", "training", RESNET18, STEP),
    )
    for threads, label in ((1, f"{name}, 1 thread"), (2, "the same, 2 threads"))
)


def table(lines: Sequence[Line], folder: Path = ZEN_4, *, floors: bool) -> list[str]:
    """Markdown, the lines below the heading; what misses its floor is bold."""
    measured = [_read(folder / name) for name in FILES]
    return [_markdown(line, measured, floors=floors) for line in lines]


def _markdown(line: Line, measured: Sequence[list[dict[str, str]]], *, floors: bool) -> str:
    by_isa = [line.rows(rows) for rows in measured]
    cells = ["; ".join(map(_cell, at_sparsity)) for at_sparsity in zip(*by_isa, strict=True)]
    text = "| " + " | ".join([line.label, *cells, *([line.floor] if floors else [])]) + " |"
    return text.replace("|  |", "| |")


def _cell(row: Mapping[str, str]) -> str:
    number = f"{float(row['speedup']):.2f}"
    return f"**{number}**" if row["outcome"] == MISS else number


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    for machine in MACHINES:
        speedups, accounts = (
            table(SPEEDUPS, machine, floors=True),
            table(ACCOUNTS, machine, floors=False),
        )
        print("\n".join([machine.name, *speedups, "", *accounts, ""]))
