"""Which algorithm computes a masked layer: what was asked for, and what the backend last chose.

A backend that has more than one way to compute a layer (the sparse kernels and the dense ones of
PyTorch) chooses for each layer by what it expects them to cost, unless one is asked for. The choice
depends on shapes, dtype and the number of active weights alone, so a run that is resumed computes
as the one that was stopped.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Algorithm = Literal["auto", "dense", "sparse"]

ALGORITHMS: tuple[str, ...] = get_args(Algorithm)

_last: WeakIdKeyDictionary = WeakIdKeyDictionary()


def note_choice(mask: Tensor, chosen: str) -> None:
    """Record what computed the layer of a packed mask."""
    _last[mask] = chosen


def last_choice(mask: Tensor) -> str | None:
    """What last computed the layer of a packed mask; None before the first time."""
    choice: str | None = _last.get(mask)
    return choice
