"""Rows of the CSV: computed from samples, written, read back and printed."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bench.machine import Stamp
from bench.registry import Case, UnavailableError, Yardstick
from bench.timing import Sample

LEFT_OUT = "left out"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the CSV; bench/README.md explains the columns. None is an empty cell."""

    group: str
    name: str
    variant: str
    mode: str
    dtype: str
    sparsity: float | None = None
    n_tensors: int | None = None
    n_weights: int | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    model_bytes: int | None = None
    account: str = ""
    gbytes_per_s: float | None = None
    ratio_to_copy: float | None = None
    baseline: str = ""
    ratio_to_baseline: float | None = None
    items_per_s: float | None = None
    repeats: int | None = None
    iterations: int | None = None
    copies: int | None = None
    device: str
    torch: str
    triton: str
    cuda: str
    driver: str
    clocks: str
    timestamp: str
    note: str = ""

    @property
    def has_failed(self) -> bool:
        """Whether it has no figures, and should have."""
        return self.median_ms is None and not self.note.startswith(LEFT_OUT)


COLUMNS = tuple(field.name for field in fields(Row))


def measured_row(
    yardstick: Yardstick,
    case: Case,
    sample: Sample,
    *,
    mode: str,
    stamp: Stamp,
    copy_rate: float | None,
    baseline_ms: float | None,
    note: str,
) -> Row:
    """The row of a successful measurement. `copy_rate` in GB/s, `baseline_ms` per call."""
    rate = case.model_bytes / sample.median_ms / 1e6 if case.model_bytes else None
    return Row(
        group=yardstick.group,
        name=yardstick.name,
        variant=yardstick.variant,
        mode=mode,
        dtype=yardstick.dtype,
        sparsity=yardstick.sparsity,
        n_tensors=case.n_tensors,
        n_weights=case.n_weights,
        **asdict(sample),
        model_bytes=case.model_bytes or None,
        account=case.account,
        gbytes_per_s=rate,
        ratio_to_copy=rate / copy_rate if rate and copy_rate else None,
        baseline=yardstick.baseline,
        ratio_to_baseline=sample.median_ms / baseline_ms if baseline_ms else None,
        items_per_s=case.items / sample.median_ms * 1e3 if case.items else None,
        copies=case.copies,
        **asdict(stamp),
        note=note,
    )


def failed_row(yardstick: Yardstick, error: Exception, *, mode: str, stamp: Stamp) -> Row:
    """The row of a measurement that raised: no figure, the error as its note."""
    kind = LEFT_OUT if isinstance(error, UnavailableError) else type(error).__name__
    text = " ".join(str(error).split())[:200]
    return Row(
        group=yardstick.group,
        name=yardstick.name,
        variant=yardstick.variant,
        mode=mode,
        dtype=yardstick.dtype,
        sparsity=yardstick.sparsity,
        baseline=yardstick.baseline,
        **asdict(stamp),
        note=f"{kind}: {text}",
    )


def _cell(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def append_csv(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to the file, with the header first where the file is new."""
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        with path.open(newline="") as file:
            header = tuple(next(csv.reader(file), ()))
        if header != COLUMNS:
            raise ValueError(f"out: {path} has other columns than this version writes")
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow([_cell(getattr(row, column)) for column in COLUMNS])


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file, column name to text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


_SHOWN = (
    ("group", "group"),
    ("name", "name"),
    ("variant", "variant"),
    ("mode", "mode"),
    ("dtype", "dtype"),
    ("sparsity", "sparsity"),
    ("median_ms", "ms"),
    ("p20_ms", "p20"),
    ("p80_ms", "p80"),
    ("gbytes_per_s", "GB/s"),
    ("ratio_to_copy", "/copy"),
    ("ratio_to_baseline", "x base"),
    ("items_per_s", "items/s"),
)


def _shown(row: Mapping[str, str], column: str) -> str:
    text = row[column]
    if column == "median_ms" and not text:
        return "failed"
    try:
        number = float(text)
    except ValueError:
        return text
    return f"{number:.4g}" if abs(number) < 1e4 else f"{number:.0f}"


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """The rows as aligned text, with the notes of those that failed below."""
    lines = [[title for _, title in _SHOWN]]
    lines += [[_shown(row, column) for column, _ in _SHOWN] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_SHOWN))]
    left = sum(column in ("group", "name", "variant", "mode", "dtype") for column, _ in _SHOWN)
    text = [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    failures = [
        f"{row['name']}/{row['variant']} ({row['mode']}): {row['note']}"
        for row in rows
        if not row["median_ms"]
    ]
    notes = {row["note"] for row in rows if row["median_ms"]} - {""}
    return "\n".join([*text, *failures, *sorted(notes)])
