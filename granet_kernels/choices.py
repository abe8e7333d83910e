"""Which algorithm computes a masked layer: what was asked for, and what the backend last chose.

A backend that has more than one way to compute a layer (the sparse kernels and the dense ones of
PyTorch) chooses for each layer by what it expects them to cost, unless one is asked for. The choice
depends on shapes, dtype and the number of active weights alone, so a run that is resumed computes
as the one that was stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from granet_kernels.weak_map import WeakTensorMap

Algorithm = Literal["auto", "dense", "sparse"]

ALGORITHMS: tuple[str, ...] = get_args(Algorithm)


@dataclass(slots=True)
class Choice:
    """Of one layer."""

    last: str | None = None
    """What last computed it; None before the first time."""


_choices: WeakTensorMap[Choice] = WeakTensorMap()  # by packed mask


def choice_of(mask: Tensor) -> Choice:
    """Where the backend notes what computes the layer of a packed mask."""
    choice = _choices.get(mask)
    if choice is None:
        choice = _choices[mask] = Choice()
    return choice


def last_choice(mask: Tensor) -> str | None:
    """What last computed the layer of a packed mask; None before the first time."""
    return choice_of(mask).last
