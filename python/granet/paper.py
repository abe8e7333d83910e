"""Accuracies that others reached, to stand beside one's own; with where each figure comes from.

None was read in the paper itself. ``2nd`` is from another publication's transcription of its tables,
``recalled`` is unverified: do not cite it as the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Provenance = Literal["2nd", "recalled"]


@dataclass(frozen=True, slots=True)
class Figure:
    """Top-1 accuracy in percent."""

    accuracy: float
    provenance: Provenance

    def __str__(self) -> str:
        source = "second source" if self.provenance == "2nd" else "recalled"
        return f"{self.accuracy:.2f} ({source})"


def _row(*cells: str) -> dict[float, Figure]:
    """At 90, 95 and 98 %; an asterisk marks what was transcribed."""
    return {
        sparsity: Figure(float(cell.rstrip("*")), "2nd" if cell.endswith("*") else "recalled")
        for sparsity, cell in zip((0.9, 0.95, 0.98), cells, strict=True)
    }


# GraNet paper, Table 2: (dataset, model) -> recipe of the method -> sparsity -> figure.
FIGURES: dict[tuple[str, str], dict[str, dict[float, Figure]]] = {
    ("cifar10", "vgg19_cifar"): {
        "snip": _row("93.63*", "93.43*", "92.05*"),
        "gmp": _row("93.59*", "93.58", "93.52"),
        "granet-dense": _row("93.80*", "93.72", "93.63"),
        "set": _row("92.46*", "91.73", "89.18"),
        "rigl": _row("93.38*", "93.06", "91.98"),
        "granet": _row("93.73", "93.66", "93.38"),
    },
    ("cifar100", "vgg19_cifar"): {
        "snip": _row("72.84*", "71.83*", "58.46*"),
        "gmp": _row("73.10", "72.30", "72.07*"),
        "granet-dense": _row("73.74", "73.10", "72.35*"),
        "set": _row("72.36", "69.81", "65.94"),
        "rigl": _row("73.13", "72.14", "69.82*"),
        "granet": _row("73.30", "73.18", "72.04"),
    },
    ("cifar10", "resnet50_cifar"): {
        "snip": _row("92.65", "90.86*", "87.21"),
        "gmp": _row("94.34", "94.52*", "94.19"),
        "granet-dense": _row("94.49", "94.44*", "94.34"),
        "rigl": _row("94.45", "93.86*", "93.26"),
        "granet": _row("94.64", "94.38*", "94.01"),
    },
    ("cifar100", "resnet50_cifar"): {
        "snip": _row("73.14*", "69.25", "58.43"),
        "gmp": _row("76.91*", "76.42", "75.58"),
        "granet-dense": _row("77.29*", "76.71", "76.10"),
        "rigl": _row("76.50*", "76.03", "75.06"),
    },
}
DENSE: dict[tuple[str, str], Figure] = {
    ("cifar10", "vgg19_cifar"): Figure(93.85, "2nd"),
    ("cifar100", "vgg19_cifar"): Figure(73.43, "2nd"),
    ("cifar10", "resnet50_cifar"): Figure(94.75, "2nd"),
    ("cifar100", "resnet50_cifar"): Figure(78.23, "2nd"),
}


def figure(dataset: str, model: str, method: str, sparsity: float) -> Figure | None:
    """Of a recipe's method, where there is one."""
    if method == "dense":
        return DENSE.get((dataset, model))
    return FIGURES.get((dataset, model), {}).get(method, {}).get(sparsity)
