"""`python -m bench.dram`: bytes that Nsight Compute counts at the memory, beside those of our accounts.

    ncu ... python -m bench.dram run --out operations.csv    every operation once, a marker before each
    python -m bench.dram table ncu.csv operations.csv --out dram.csv

`bench/gpu_suite.sh` has the options of ncu. Kernels between two markers belong to one operation. What an
operation has written may leave the cache after it: the figures of reads are the more exact ones.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from bench import machine, registry
from bench.registry import Case, Yardstick

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum")
MARKER = "spin_kernel"  # torch.cuda._sleep launches it
UNITS = {"byte": 1, "ns": 1e-3, "nsecond": 1e-3}  # --print-units base; time in microseconds
# What is looked at: name/variant, in fp32.
ROWS = (
    "sgd_weights/torch_fused",
    "sgd_weights/cuda_*",
    "sgd_weights/triton_*",
    "cast_weights/*",
    "select_kaiming/cuda",
    "select_kaiming/triton",
    "select_kaiming/torch_topk_unsorted",
    "prune*/cuda",
    "prune*/triton",
    "update/cuda",
    "update/triton",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """A row of the table."""

    name: str
    variant: str
    sparsity: float | None
    model_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """An operation, its kernels and what they moved."""

    name: str
    variant: str
    sparsity: str
    kernels: int
    microseconds: float
    model_bytes: int
    dram_read: int
    dram_written: int
    dram_over_model: float


def _rows(only: Sequence[str]) -> list[Yardstick]:
    found = registry.select(registry.registered(), only=only)
    return [row for row in found if row.dtype == "float32" and row.group in ("step", "selection")]


def _run_once(case: Case) -> None:
    with case.around():
        for counted in (False, True):  # compiled, and its tables written
            if case.reset is not None:
                case.reset()
            torch.cuda.synchronize()
            if counted:
                torch.cuda.cudart().cudaProfilerStart()
                torch.cuda._sleep(1)
            case.run()
            torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def run(out: Path, only: Sequence[str] = ROWS) -> None:
    """Every operation once, for ncu to look at, and a record of which they were."""
    setting = registry.Setting(device=machine.find_device("cuda"))
    done = []
    for row in _rows(only):
        case = row.build(setting)
        _run_once(case)
        done.append(
            Operation(
                name=row.name,
                variant=row.variant,
                sparsity=row.sparsity,
                model_bytes=case.model_bytes,
            )
        )
        del case
    _write(out, Operation, done)


def _write(out: Path, kind: type, rows: list) -> None:
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(kind)])
        writer.writeheader()
        writer.writerows(map(asdict, rows))


@dataclass(slots=True)
class Launch:
    """A kernel as ncu saw it: bytes and microseconds."""

    kernel: str
    read: float = 0.0
    written: float = 0.0
    microseconds: float = 0.0


def launches(report: Path) -> list[Launch]:
    """From ncu's `--csv --page details --print-details all`, a line for each kernel and metric, in order."""
    lines = report.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    found: dict[str, Launch] = {}
    for line in csv.DictReader(lines[start:]):
        launch = found.setdefault(line["ID"], Launch(line["Kernel Name"]))
        value = float(line["Metric Value"].replace(",", "")) * UNITS[line["Metric Unit"]]
        match line["Metric Name"]:
            case "dram__bytes_read.sum":
                launch.read = value
            case "dram__bytes_write.sum":
                launch.written = value
            case "gpu__time_duration.sum":
                launch.microseconds = value
    return list(found.values())


def _operations(kernels: list[Launch]) -> Iterator[list[Launch]]:
    current: list[Launch] | None = None
    for kernel in kernels:
        if MARKER in kernel.kernel:
            if current is not None:
                yield current
            current = []
        elif current is not None:
            current.append(kernel)
    if current is not None:
        yield current


def count(report: Path, operations: Path) -> list[tuple[Counted, list[Launch]]]:
    """The record of the operations, with what their kernels moved."""
    with operations.open() as file:
        done = list(csv.DictReader(file))
    counted = []
    for row, kernels in zip(done, _operations(launches(report)), strict=True):
        read, written = (
            round(sum(getattr(kernel, what) for kernel in kernels)) for what in ("read", "written")
        )
        model = int(row["model_bytes"])
        total = Counted(
            name=row["name"],
            variant=row["variant"],
            sparsity=row["sparsity"],
            kernels=len(kernels),
            microseconds=round(sum(kernel.microseconds for kernel in kernels), 2),
            model_bytes=model,
            dram_read=read,
            dram_written=written,
            dram_over_model=round((read + written) / model, 4) if model else 0.0,
        )
        counted.append((total, kernels))
    return counted


LINE = "{:44} {:>8} {:>7} {:>9} {:>9} {:>9} {:>9} {:>10}"


def table(counted: list[tuple[Counted, list[Launch]]]) -> str:
    """For the eye: the operations, and the kernels of those that have several."""
    titles = (
        "operation",
        "sparsity",
        "kernels",
        "us",
        "model MB",
        "read MB",
        "written",
        "DRAM/model",
    )
    lines = [LINE.format(*titles)]
    for row, kernels in counted:
        bytes_of = (row.model_bytes, row.dram_read, row.dram_written)
        megabytes = [f"{number / 1e6:.1f}" for number in bytes_of]
        name, time = f"{row.name}/{row.variant}", f"{row.microseconds:.1f}"
        ratio = f"{row.dram_over_model:.3f}"
        lines.append(LINE.format(name, row.sparsity, row.kernels, time, *megabytes, ratio))
        for kernel in kernels if len(kernels) > 1 else ():
            moved = [f"{number / 1e6:.1f}" for number in (kernel.read, kernel.written)]
            short = kernel.kernel.split("(")[0].split("<")[0].split("::")[-1]
            lines.append(
                LINE.format(f"    {short}", "", "", f"{kernel.microseconds:.1f}", "", *moved, "")
            )
    return "\n".join(line.rstrip() for line in lines)


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.dram", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="the operations, to be called by ncu")
    runs.add_argument("--out", type=Path, required=True)
    runs.add_argument("--only", nargs="+", default=ROWS, metavar="GLOB", help="by name/variant")
    tables = commands.add_parser("table", help="ncu's report as a table and a CSV")
    tables.add_argument("report", type=Path)
    tables.add_argument("operations", type=Path)
    tables.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.command == "run":
        import bench.yardsticks  # noqa: F401 (registers the rows)

        run(args.out, args.only)
        return 0
    counted = count(args.report, args.operations)
    _write(args.out, Counted, [total for total, _ in counted])
    print(table(counted))
    return 0


if __name__ == "__main__":
    sys.exit(main())
