"""Selection by rank, computed by ``csrc/cpu/select*.cpp``; the caller has checked the arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from granet_kernels.layout import aligned


def prune_(
    weights: Sequence[Tensor], masks: Sequence[Tensor], k: Tensor, momenta: Sequence[Tensor]
) -> None:
    """Keep the ``k`` largest magnitudes among the active weights; zero the others and their momentum.

    ``k``: int64 on the CPU, ``(1,)`` for all tensors together or ``(len(weights),)``, one for each.
    """
    if weights:
        torch.ops.granet_cpp.prune_.default(
            list(weights), list(masks), k.contiguous(), list(momenta)
        )


def pruned_masks(weights: Sequence[Tensor], masks: Sequence[Tensor], k: Tensor) -> list[Tensor]:
    """The masks that :func:`prune_` would leave."""
    if not weights:
        return []
    pruned = torch.ops.granet_cpp.pruned_masks.default(list(weights), list(masks), k.contiguous())
    return cast(list[Tensor], pruned)


def drop_regrow_(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    scores: Sequence[Tensor],
    drop_fraction: Tensor,
    momenta: Sequence[Tensor],
) -> None:
    """In each tensor drop ``ceil(drop_fraction * active)``, regrow as many by largest ``|score|``.

    A score whose elements lie in memory as those of its weight do is read in place; any other is
    copied first.
    """
    if weights:
        torch.ops.granet_cpp.drop_regrow_.default(
            list(weights),
            list(masks),
            _elements(scores, weights),
            float(drop_fraction),
            list(momenta),
        )


def prune_drop_regrow_(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    scores: Sequence[Tensor],
    k: Tensor,
    drop_fraction: Tensor,
    momenta: Sequence[Tensor],
) -> list[Tensor]:
    """:func:`prune_`, then :func:`drop_regrow_`, with fewer passes; returns the masks in between."""
    if not weights:
        return []
    pruned = torch.ops.granet_cpp.prune_drop_regrow_.default(
        list(weights),
        list(masks),
        _elements(scores, weights),
        k.contiguous(),
        float(drop_fraction),
        list(momenta),
    )
    return cast(list[Tensor], pruned)


def topk_mask(scores: Sequence[Tensor], k: Tensor) -> list[Tensor]:
    """Packed masks of the ``k`` largest scores, signed; ``k`` as in :func:`prune_`."""
    if not scores:  # the dispatcher finds its kernel by a tensor
        return []
    masks = torch.ops.granet_cpp.topk_mask.default(list(scores), k.contiguous())
    return cast(list[Tensor], masks)


def _elements(scores: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """In the order in which those of their weights lie in memory."""
    return [
        aligned(score, like=weight).contiguous()
        for weight, score in zip(weights, scores, strict=True)
    ]
