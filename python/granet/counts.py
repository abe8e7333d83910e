"""How many weights stay active: at the start, and after each prune. All rounding happens here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from granet.distributions import (
    Distribution,
    Explicit,
    Shape,
    active_budget,
    distribution_of,
    layer_budgets,
)

Scope = Literal["global", "layer"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ActiveCounts:
    """Integer budgets that meet a sparsity exactly, or those of the published code."""

    shapes: Sequence[Shape]
    """One weight shape for each layer."""
    distribution: str | Distribution
    """How a sparsity is shared among the layers: a key of ``DISTRIBUTIONS``, or a rule."""
    scope: Scope
    """Whether a prune has one budget over all layers or one for each."""
    floor: int = 1
    """Fewest active weights of a layer that has as many."""
    official_rounding: bool = False
    """Counts of the published code (core.py of its CIFAR part), which knows no floor."""

    def check_feasible(self, sparsity: float, active: Sequence[int]) -> None:
        """Whether ``sparsity`` can be reached from layers of so many active weights.

        Raises:
            ValueError: it leaves a layer without its fewest weights (the message names the largest
                feasible one), or less is active already.
        """
        caps = active if self.scope == "layer" else None
        layer_budgets(self.shapes, sparsity, self.distribution, caps, self.floor)
        if isinstance(self.distribution, Explicit):
            self.distribution.check(self.shapes, sparsity)
        check_enough(active, self.shapes, sparsity)

    def initial(self, sparsity: float, generator: torch.Generator) -> list[int]:
        """Active weights of each layer before training.

        The published code draws each weight by its layer's probability, so its counts are random.
        """
        if not self.official_rounding:
            return layer_budgets(self.shapes, sparsity, self.distribution, floor=self.floor)
        fractions = distribution_of(self.distribution)(self.shapes, sparsity)
        return [
            int((torch.rand(math.prod(shape), generator=generator) < fraction).sum())
            for shape, fraction in zip(self.shapes, fractions, strict=True)
        ]

    def after_prune(self, sparsity: float, active: Sequence[int]) -> int | list[int]:
        """Weights that a prune keeps: over all layers, or a list.

        The published code prunes the k-th largest weight itself where it prunes globally.

        Args:
            sparsity: to prune to, over all layers together.
            active: active weights of each layer now. A layer's budget never grows, so that budgets
                whose rounding would differ between prunes still add up.
        """
        numels = [math.prod(shape) for shape in self.shapes]
        if self.scope == "global":
            if self.official_rounding:
                return max(int(sum(numels) * (1 - sparsity)) - 1, 0)
            return active_budget(sparsity, sum(numels))
        if self.official_rounding:
            return [int(numel * (1 - sparsity)) for numel in numels]
        if sum(active) <= active_budget(sparsity, sum(numels)):
            return list(active)
        return layer_budgets(self.shapes, sparsity, self.distribution, active, self.floor)

    def __post_init__(self) -> None:
        if self.scope not in ("global", "layer"):
            raise ValueError(f"scope: expected 'global' or 'layer', got {self.scope!r}")
        if not isinstance(self.floor, int) or self.floor < 0:
            raise ValueError(f"floor: expected an integer of at least 0, got {self.floor!r}")
        distribution_of(self.distribution)


def check_enough(active: Sequence[int], shapes: Sequence[Shape], sparsity: float) -> None:
    """Raise ValueError where fewer weights are active than a sparsity keeps: none is ever added."""
    target = active_budget(sparsity, sum(math.prod(shape) for shape in shapes))
    if sum(active) < target:
        raise ValueError(
            f"model: expected at least {target} active weights, which sparsity={sparsity} keeps, "
            f"got {sum(active)}"
        )
