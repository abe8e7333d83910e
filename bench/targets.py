"""The targets on a GPU, and what a CSV of measurements says of them. A target is no place to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.runner import EAGER, GRAPH

Rows = Sequence[Mapping[str, str]]

READ = "one read at copy bandwidth"


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """`row` takes at most `bound` times as long as `against`."""

    row: str
    """name/variant."""
    against: str
    """name/variant of a row of the same group and dtype, or READ: its numbers, at the rate of the copy."""
    bound: float
    sparsity: str = ""
    dtype: str = "float32"
    mode: str = GRAPH

    def __str__(self) -> str:
        at = f" at {float(self.sparsity):.0%}" if self.sparsity else ""
        return f"{self.row}{at} ({self.dtype}, {self.mode}) <= {self.bound:g} x {self.against}"


DENSE_STEP = "sgd_weights/torch_fused"
TOPK = "select_kaiming/torch_topk_sorted"


def _targets_of(backend: str) -> tuple[Target, ...]:
    step, prune, update = f"sgd_weights/{backend}", f"prune/{backend}", f"update/{backend}"
    return (
        Target(row=f"{step}_uniform", sparsity="0", against=DENSE_STEP, bound=1.02),
        Target(row=f"{step}_erk", sparsity="0.9", against=DENSE_STEP, bound=0.6),
        Target(row=f"{step}_uniform", sparsity="0.98", against=DENSE_STEP, bound=0.35),
        Target(row=f"{step}_erk", sparsity="0.98", against=DENSE_STEP, bound=0.35),
        Target(row=prune, sparsity="0.9", against=READ, bound=2),
        Target(row=prune, sparsity="0.9", against=TOPK, bound=1 / 20),
        Target(row=update, sparsity="0.9", against=READ, bound=5),
        Target(
            row=f"resnet50_gradients/{backend}",
            sparsity="0.9",
            dtype="bfloat16",
            mode=EAGER,
            against="resnet50_gradients/dense",
            bound=1.01,
        ),
        Target(
            row=f"resnet50_step/{backend}",
            sparsity="0.9",
            dtype="bfloat16",
            mode=EAGER,
            against="resnet50_step/dense_fused",
            bound=1.0,
        ),
    )


TARGETS = (
    *_targets_of("cuda"),
    *_targets_of("triton"),
    Target(
        row="resnet50_step/cuda",
        sparsity="0.9",
        dtype="float16",
        mode=EAGER,
        against="resnet50_step/dense_fused",
        bound=1.0,
    ),
)


def judge(target: Target, rows: Rows) -> float | None:
    """The time of the row over what it is compared with; None where one of them was not measured."""
    ours = _find(rows, target.row, target.sparsity, target.dtype, target.mode)
    if ours is None:
        return None
    if target.against == READ:
        copy = _find(rows, "copy/512MiB", "", "float32", EAGER, ours["group"])
        if copy is None:
            return None
        theirs = 4 * float(ours["n_weights"]) / float(copy["gbytes_per_s"]) / 1e6
    else:
        place = (target.against, "", target.dtype)
        row = _find(rows, *place, target.mode, ours["group"]) or _find(
            rows, *place, EAGER, ours["group"]
        )
        if row is None:
            return None
        theirs = float(row["median_ms"])
    return float(ours["median_ms"]) / theirs


def verdicts(rows: Rows) -> str:
    """A line for each target."""
    lines = []
    for target in TARGETS:
        ratio = judge(target, rows)
        outcome = "not measured" if ratio is None else "met" if ratio <= target.bound else "MISSED"
        shown = "" if ratio is None else f"{ratio:.4g}"
        lines.append(f"{outcome:12}  {shown:>8}  {target}")
    return "\n".join(lines)


def _find(
    rows: Rows, row: str, sparsity: str, dtype: str, mode: str, group: str = ""
) -> Mapping[str, str] | None:
    name, variant = row.split("/")
    for found in rows:
        place = (found["name"], found["variant"], found["sparsity"], found["dtype"], found["mode"])
        if place == (name, variant, sparsity, dtype, mode) and group in ("", found["group"]):
            return found if found["median_ms"] else None
    return None
