"""Selecting weights by magnitude and by score.

One rule decides everything: :func:`largest` keeps the ``count`` largest keys, equal keys by the
lower index (of the tensor in the list, then of the element in storage order). Keys are magnitudes,
so +0.0 and -0.0 are equal, and a key below zero puts an element behind every magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from granet_kernels.backends.reference.mask import pack_mask, unpack_mask
from granet_kernels.layout import aligned, storage_view


def largest(keys: Tensor, count: int) -> Tensor:
    """Bool, True at the ``count`` largest of 1-D ``keys``; NaN above all, ties to the lower index."""
    order = torch.argsort(keys, descending=True, stable=True)
    chosen = torch.zeros_like(keys, dtype=torch.bool)
    chosen[order[: max(count, 0)]] = True
    return chosen


def set_mask(mask: Tensor, active: Tensor, states: Sequence[Tensor]) -> None:
    """Write the bits; whatever becomes active or inactive by that is +0.0 in ``states``.

    All else stays as it is: an inactive weight and its momentum are +0.0 already.
    """
    changed = active ^ unpack_mask(mask, active.numel())
    mask.copy_(pack_mask(active))
    for state in states:
        storage_view(state).masked_fill_(changed, 0.0)


def prune_(
    weights: Sequence[Tensor], masks: Sequence[Tensor], k: Tensor, momenta: Sequence[Tensor]
) -> None:
    """Keep the ``k`` largest magnitudes among the active weights; zero the others and their momentum."""
    pruned = pruned_masks(weights, masks, k)
    for i, (weight, mask) in enumerate(zip(weights, masks, strict=True)):
        kept = unpack_mask(pruned[i], weight.numel())
        set_mask(mask, kept, [weight, *momenta[i : i + 1]])


def pruned_masks(weights: Sequence[Tensor], masks: Sequence[Tensor], k: Tensor) -> list[Tensor]:
    """The masks of the ``k`` largest magnitudes among the active weights.

    ``k`` holds one count for all tensors together or one for each. Fewer than ``k`` active weights
    all stay; pruning never activates one. A NaN weight ranks above every magnitude, so that a
    broken run shows instead of being pruned away.
    """
    was_active = [
        unpack_mask(mask, weight.numel()) for weight, mask in zip(weights, masks, strict=True)
    ]
    keys = [magnitude(weight, on) for weight, on in zip(weights, was_active, strict=True)]
    counts = k.tolist()
    if len(counts) == len(weights):
        kept = [largest(key, count) for key, count in zip(keys, counts, strict=True)]
    else:
        kept = list(largest(torch.cat(keys), counts[0]).split([key.numel() for key in keys]))
    return [pack_mask(new & old) for new, old in zip(kept, was_active, strict=True)]


def drop_regrow_(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    scores: Sequence[Tensor],
    drop_fraction: Tensor,
    momenta: Sequence[Tensor],
) -> None:
    """In each tensor drop the ceil(p * active) smallest magnitudes, regrow as many by largest |score|.

    The product p * active is one IEEE double; p outside [0, 1] counts as the nearer end, NaN as 0.
    Every inactive weight can regrow, those just dropped included: a weight that is dropped and
    regrown keeps its value and momentum, one that was inactive before starts from +0.0. A NaN score
    ranks behind all others. The number of active weights stays.
    """
    p = float(drop_fraction)
    p = min(p, 1.0) if p > 0 else 0.0
    for i, (weight, mask, score) in enumerate(zip(weights, masks, scores, strict=True)):
        was_active = unpack_mask(mask, weight.numel())
        active_count = int(was_active.sum())
        dropped = math.ceil(p * active_count)
        kept = was_active & largest(magnitude(weight, was_active), active_count - dropped)
        gain = aligned(score, like=weight).abs().nan_to_num(nan=-1.0, posinf=math.inf)
        regrown = largest(gain.masked_fill(kept, -2.0), dropped)
        set_mask(mask, kept | regrown, [weight, *momenta[i : i + 1]])


def prune_drop_regrow_(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    scores: Sequence[Tensor],
    k: Tensor,
    drop_fraction: Tensor,
    momenta: Sequence[Tensor],
) -> list[Tensor]:
    """:func:`prune_`, then :func:`drop_regrow_`; the masks as they are in between are returned."""
    prune_(weights, masks, k, momenta)
    pruned = [mask.clone() for mask in masks]
    drop_regrow_(weights, masks, scores, drop_fraction, momenta)
    return pruned


def topk_mask(scores: Sequence[Tensor], k: Tensor) -> list[Tensor]:
    """Packed masks of the ``k`` largest scores (signed); ``k`` as in :func:`prune_`, NaN behind -inf."""
    keys = [storage_view(score) for score in scores]
    counts = k.tolist()
    if len(counts) == len(scores):
        chosen = [largest_numbers(key, count) for key, count in zip(keys, counts, strict=True)]
    else:
        chosen = list(
            largest_numbers(torch.cat(keys), counts[0]).split([key.numel() for key in keys])
        )
    return [pack_mask(mask) for mask in chosen]


def magnitude(weight: Tensor, on: Tensor) -> Tensor:
    """|weight| in storage order; -1, behind every magnitude, where it is not active."""
    return storage_view(weight).abs().masked_fill(~on, -1.0)


def largest_numbers(keys: Tensor, count: int) -> Tensor:
    """As :func:`largest`, but with NaN behind all numbers."""
    numbers_first = torch.argsort(keys.isnan(), stable=True)
    numbers = int((~keys.isnan()).sum())
    chosen = torch.zeros_like(keys, dtype=torch.bool)
    chosen[numbers_first] = torch.cat(
        [
            largest(keys[numbers_first[:numbers]], count),
            torch.arange(keys.numel() - numbers, device=keys.device) < count - numbers,
        ]
    )
    return chosen
