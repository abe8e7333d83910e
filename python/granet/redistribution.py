"""How the weights that an update regrows are shared among the layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from granet.distributions import apportion

Worth = Callable[[Tensor, Tensor | None], Tensor]
"""What a layer is ranked by, a scalar on its device, from its weight and its momentum."""


def by_magnitude(weight: Tensor, momentum: Tensor | None) -> Tensor:
    """Sum of the magnitudes of the weight: inactive ones are zero."""
    return weight.detach().double().abs().sum()


def by_momentum(weight: Tensor, momentum: Tensor | None) -> Tensor:
    """Sum of the magnitudes of the optimizer's momentum (SNFS; Dettmers & Zettlemoyer, 2019).

    Raises:
        ValueError: the optimizer keeps none.
    """
    if momentum is None:
        raise ValueError("redistribution: 'momentum' expected an optimizer with momentum, got none")
    return momentum.double().abs().sum()


REDISTRIBUTION: Mapping[str, Worth | None] = {
    "none": None,
    "magnitude": by_magnitude,
    "momentum": by_momentum,
}
"""None: every layer regrows what it dropped."""


def check_redistribution(name: str, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError where an optimizer will not keep what a redistribution is by."""
    keeps = any(group.get("momentum") or "betas" in group for group in optimizer.param_groups)
    known = any("momentum" in group or "betas" in group for group in optimizer.param_groups)
    if name == "momentum" and known and not keeps:
        raise ValueError(
            "redistribution: 'momentum' expected an optimizer with momentum, got "
            f"{type(optimizer).__name__} without"
        )


def shares(
    total: int, worth: Sequence[float], active: Sequence[int], room: Sequence[int]
) -> list[int]:
    """``total`` regrown weights, shared in proportion to the mean worth of an active weight.

    Args:
        total: over all layers.
        worth: sum over the active weights of each layer, not negative.
        active: how many those are.
        room: most that each layer can take; together at least ``total``.
    """
    means = [
        value / count if count and math.isfinite(value) else 0.0
        for value, count in zip(worth, active, strict=True)
    ]
    largest = max(means, default=0.0)
    means = [mean / largest if largest else 0.0 for mean in means]  # subnormal ones would overflow
    open_layers = [i for i, free in enumerate(room) if free > 0]
    all_means = math.fsum(means[i] for i in open_layers)
    scale = total / all_means if all_means else 0.0  # then in proportion to the room
    counts = apportion(
        [means[i] * scale / room[i] for i in open_layers],
        [room[i] for i in open_layers],
        total,
        floor=0,
    )
    found = dict(zip(open_layers, counts, strict=True))
    return [found.get(i, 0) for i in range(len(room))]
