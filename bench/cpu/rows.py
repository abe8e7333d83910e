"""Rows of the table: computed from races, summed up by geometric means, written as CSV, printed."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bench.cpu.race import Comparison
from bench.cpu.targets import GEOMETRIC, Target

PASS, MISS, FAILED = "pass", "MISS", "FAILED"
GEOMEAN = "geometric mean"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line: ours against one baseline. None is an empty cell; bench/README.md explains them."""

    group: str
    case: str
    measure: str
    threads: int
    sparsity: float | None
    masks: str = ""
    baseline: str
    baseline_variant: str = ""
    baseline_ms: float | None = None
    ours: str
    ours_variant: str = ""
    ours_ms: float | None = None
    backend: str = ""
    speedup: float | None = None
    speedup_p20: float | None = None
    speedup_p80: float | None = None
    cost: bool = False
    """Which way up the ratio is: ours over the baseline instead of the baseline over ours."""
    target: Target | None = None
    outcome: str = ""
    rounds: int | None = None
    images: int | None = None
    """Images in a call, where there are any."""
    baseline_peak_mib: float | None = None
    ours_peak_mib: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """The speed-up or, as a cost, its inverse."""
        if self.speedup is None:
            return None
        return 1 / self.speedup if self.cost else self.speedup


def outcome(speedup: float | None, target: Target | None) -> str:
    """pass, MISS, FAILED (ours could not be measured) or nothing (no target)."""
    if speedup is None:
        return FAILED
    if target is None:
        return ""
    return PASS if target.met(speedup) else MISS


def compared(comparison: Comparison | None) -> dict[str, object]:
    """The fields that a comparison fills."""
    return {} if comparison is None else asdict(comparison)


def geometric_means(rows: Sequence[Row]) -> list[Row]:
    """A row for each group, measure, baseline, number of threads and sparsity with several shapes.

    Only of groups whose targets are geometric means, or that compare the same things.
    """
    families: dict[tuple[str, str, str, int, float], list[Row]] = {}
    known = {(group, baseline) for group, _, baseline in GEOMETRIC}
    known |= {("conv", "SparseProp"), ("conv-batch-1", "dense")}
    known |= {("conv-account", "dense"), ("linear-account", "dense")}
    for row in rows:
        if (row.group, row.baseline) in known and row.sparsity is not None:
            key = (row.group, row.measure, row.baseline, row.threads, row.sparsity)
            families.setdefault(key, []).append(row)
    return [_geometric_mean(family) for family in families.values() if len(family) > 1]


def _geometric_mean(family: Sequence[Row]) -> Row:
    first = family[0]
    speedups = [row.speedup for row in family if row.speedup is not None]
    mean = math.exp(math.fsum(map(math.log, speedups)) / len(speedups)) if speedups else None
    target = None
    if first.sparsity is not None:
        known = GEOMETRIC.get((first.group, first.measure, first.baseline), {})
        target = known.get(first.sparsity)
    missing = len(family) - len(speedups)
    return Row(
        group=first.group,
        case=f"{GEOMEAN} of {len(speedups)}",
        measure=first.measure,
        threads=first.threads,
        sparsity=first.sparsity,
        masks=first.masks,
        baseline=first.baseline,
        ours=first.ours,
        backend=first.backend,
        speedup=mean,
        speedup_p20=min(speedups, default=None),
        speedup_p80=max(speedups, default=None),
        target=target,
        outcome=outcome(mean, target),
        note="p20 and p80: worst and best shape" + (f"; {missing} failed" if missing else ""),
    )


def images_per_second(images: int | None, milliseconds: float | None) -> float | None:
    """None where one of the two is unknown."""
    return images / milliseconds * 1e3 if images and milliseconds else None


def record(row: Row) -> dict[str, object]:
    """The row as columns of the CSV, targets and derived numbers included."""
    columns: dict[str, object] = {}
    for field in fields(row):
        if field.name == "cost":
            continue
        columns[field.name] = getattr(row, field.name)
        if field.name == "speedup_p80":
            columns["ratio"] = row.ratio
            columns["ratio_is"] = "ours/baseline" if row.cost else "baseline/ours"
        if field.name == "images":
            columns["baseline_images_per_s"] = images_per_second(row.images, row.baseline_ms)
            columns["ours_images_per_s"] = images_per_second(row.images, row.ours_ms)
    return columns


def write_csv(path: Path, rows: Iterable[Row], host: dict[str, object]) -> None:
    """Replaces the file; `host` is the same in every row."""
    records = [record(row) | host for row in rows]
    if not records:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        for columns in records:
            writer.writerow({name: _cell(value) for name, value in columns.items()})


def _cell(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


_TITLES = (
    *("group", "case", "measure", "thr", "sparsity", "baseline", "ms", "ours", "ms"),
    *("ratio", "p20", "p80", "target", ""),
    *("img/s base", "ours", "MiB base", "ours"),
)
_LEFT = {0, 1, 2, 5, 7, 13}


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text; columns that no row fills are left out, notes come below."""
    lines = [list(_TITLES), *(_line(row) for row in rows)]
    used = [i for i in range(len(_TITLES)) if any(line[i] for line in lines[1:])]
    widths = {i: max(len(line[i]) for line in lines) for i in used}
    text = [
        "  ".join(
            line[i].ljust(widths[i]) if i in _LEFT else line[i].rjust(widths[i]) for i in used
        ).rstrip()
        for line in lines
    ]
    notes = dict.fromkeys(
        f"{row.group} {row.case}, {row.baseline}, {row.ours}: {row.note}"
        for row in rows
        if row.note and not row.case.startswith(GEOMEAN)
    )
    return "\n".join([*text, *notes])


def _line(row: Row) -> list[str]:
    sparsity = "" if row.sparsity is None else f"{row.sparsity:.0%}"
    low, high = row.speedup_p20, row.speedup_p80
    if row.cost and low and high:
        low, high = 1 / high, 1 / low
    return [
        row.group,
        row.case,
        row.measure,
        str(row.threads),
        f"{sparsity} {row.masks}".strip(),
        f"{row.baseline} {row.baseline_variant}".strip(),
        _number(row.baseline_ms),
        f"{row.ours} {row.ours_variant}".strip() + (f" ({row.backend})" if row.backend else ""),
        _number(row.ours_ms),
        _number(row.ratio),
        _number(low),
        _number(high),
        str(row.target or ""),
        row.outcome,
        _number(images_per_second(row.images, row.baseline_ms)),
        _number(images_per_second(row.images, row.ours_ms)),
        _number(row.baseline_peak_mib),
        _number(row.ours_peak_mib),
    ]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def summary(rows: Sequence[Row]) -> str:
    """How many targets were met."""
    held = [row for row in rows if row.outcome]
    counts = [f"{sum(row.outcome == kind for row in held)} {kind}" for kind in (PASS, MISS, FAILED)]
    return f"targets: {', '.join(counts)}"
