"""Selection by rank, computed by ``csrc/cuda/select*``; the caller has checked the arguments.

The host reads nothing of the device. Counts and fractions on the host travel as arguments of kernels.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from granet_kernels.backends.composed import in_turn, on_copies
from granet_kernels.backends.cuda.library import HOST_RUN
from granet_kernels.layout import aligned

SAMPLE_FROM = 1 << 14 if HOST_RUN else 1 << 16
"""What is ranked together is sampled first, if it has so many elements: it saves most of a pass over
them. The tests, which run on the host, have little that is so large."""


def prune_(weights: list[Tensor], masks: list[Tensor], k: Tensor, momenta: list[Tensor]) -> None:
    """Keep the ``k`` largest magnitudes among the active weights; zero the others and their momentum.

    ``k``: int64, ``(1,)`` for all tensors together or ``(len(weights),)``, one for each.
    """
    if weights:
        torch.ops.granet_cuda.prune_.default(weights, masks, k.contiguous(), momenta, SAMPLE_FROM)


def drop_regrow_(
    weights: list[Tensor],
    masks: list[Tensor],
    scores: list[Tensor],
    drop_fraction: Tensor,
    momenta: list[Tensor],
) -> None:
    """In each tensor drop ``ceil(drop_fraction * active)``, regrow as many by largest ``|score|``.

    A score whose elements lie in memory as those of its weight do is read in place; any other is
    copied first.
    """
    if weights:
        elements = [
            aligned(score, like=weight).contiguous()
            for weight, score in zip(weights, scores, strict=True)
        ]
        torch.ops.granet_cuda.drop_regrow_.default(
            weights, masks, elements, drop_fraction, momenta, SAMPLE_FROM
        )


prune_drop_regrow_ = in_turn(prune_, drop_regrow_)
pruned_masks = on_copies(prune_)


def topk_mask(scores: list[Tensor], k: Tensor) -> list[Tensor]:
    """Packed masks of the ``k`` largest scores, signed; ``k`` as in :func:`prune_`."""
    if not scores:  # the dispatcher finds its kernel by a tensor
        return []
    masks = torch.ops.granet_cuda.topk_mask.default(scores, k.contiguous(), SAMPLE_FROM)
    return cast(list[Tensor], masks)
