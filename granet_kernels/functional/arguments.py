"""Arguments in the form that the operators take."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor


def tensor_list(argument: str, tensors: Sequence[Tensor] | None) -> list[Tensor]:
    """A lone tensor is refused: iterating over it would take its rows for tensors."""
    if tensors is None:
        return []
    if isinstance(tensors, Tensor):
        raise TypeError(
            f"{argument}: expected a sequence of tensors, got one tensor; write [tensor]"
        )
    return list(tensors)


def counts_of(
    k: int | Sequence[int] | Tensor, numels: Sequence[int], device: torch.device
) -> Tensor:
    """``k`` as the operator takes it: int64, one element for all tensors together or one for each."""
    if isinstance(k, Tensor):
        return k
    if isinstance(k, Sequence):
        counts, limits = list(k), list(numels)
    elif isinstance(k, Integral):
        counts, limits = [int(k)], [sum(numels)]
    else:
        raise TypeError(f"k: expected an integer, a list of them or an int64 tensor, got {k!r}")
    if len(counts) != len(limits):
        raise ValueError(
            f"k: expected one count, or {len(limits)}, one for each tensor, got {len(counts)}"
        )
    for i, (count, limit) in enumerate(zip(counts, limits, strict=True)):
        if not 0 <= count <= limit:
            name = "k" if isinstance(k, Integral) else f"k[{i}]"
            raise ValueError(f"{name}: expected a count from 0 to {limit}, got {count}")
    return torch.tensor(counts, dtype=torch.int64, device=device)


def fraction_of(drop_fraction: float | Tensor) -> Tensor:
    """``drop_fraction`` as the operator takes it: float64, one element, on the host unless it is a tensor."""
    if isinstance(drop_fraction, Tensor):
        return drop_fraction
    if not 0 <= drop_fraction <= 1:  # NaN neither
        raise ValueError(f"drop_fraction: expected a number in [0, 1], got {drop_fraction}")
    return torch.tensor(drop_fraction, dtype=torch.float64)
