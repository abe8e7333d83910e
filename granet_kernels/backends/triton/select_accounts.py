"""Bytes that selection moves, as ``accounts.py`` counts: from the arguments, before the call.

Which groups a pass reads and writes depends on the values, so the passes are gone through here, by
the reference's rule: largest first, ties by position. Left out are histograms, too: less than a hundredth.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from granet_kernels.backends.triton.accounts import SECTOR, in_groups, in_sectors
from granet_kernels.backends.triton.launch import GROUP
from granet_kernels.backends.triton.select_keys import Order, digits, key_bits
from granet_kernels.layout import aligned, packed_length, storage_view


def prune_bytes(
    weights: Sequence[Tensor], masks: Sequence[Tensor], k: Tensor, momenta: Sequence[Tensor]
) -> int:
    """The active weights twice, and the undecided ones in each further pass; what is zeroed."""
    active = _unpacked(weights, masks)
    ranked = _ranked("magnitude", weights, active, k.tolist())
    total = 0
    for i, of_tensor in enumerate(ranked):
        zeroed = [weights[i], *momenta[i : i + 1]]
        total += _moved(of_tensor, weights[i], active[i], active[i], zeroed, bits_ranked=1)
    return total


def drop_regrow_bytes(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    scores: Sequence[Tensor],
    drop_fraction: Tensor,
    momenta: Sequence[Tensor],
) -> int:
    """The weights ranked into a mask of what is kept; the scores of the others ranked; what is zeroed."""
    p = min(max(float(drop_fraction.nan_to_num(nan=0.0)), 0.0), 1.0)
    active = _unpacked(weights, masks)
    dropped = [math.ceil(p * int(on.sum())) for on in active]
    counts = [int(on.sum()) - count for on, count in zip(active, dropped, strict=True)]
    ranked = _ranked("magnitude", weights, active, counts)
    others = [~of_tensor.chosen for of_tensor in ranked]
    in_order = [aligned(score, like=w) for score, w in zip(scores, weights, strict=True)]
    grown = _ranked("growth", in_order, others, dropped)
    total = 0
    for i, weight in enumerate(weights):
        total += _moved(ranked[i], weight, active[i], None, [], bits_ranked=1)
        zeroed = [weight, *momenta[i : i + 1]]
        total += _moved(grown[i], in_order[i], others[i], active[i], zeroed, bits_ranked=2)
    return total


def topk_mask_bytes(scores: Sequence[Tensor], k: Tensor) -> int:
    """The scores twice, and the undecided ones in each further pass."""
    everything = [torch.ones_like(storage_view(score), dtype=torch.bool) for score in scores]
    ranked = _ranked("number", scores, everything, k.tolist())
    return sum(
        _moved(of_tensor, score, on, None, [], bits_ranked=0)
        for of_tensor, score, on in zip(ranked, scores, everything, strict=True)
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Ranked:
    """A tensor's elements in a ranking."""

    keys: Tensor
    threshold: int
    shifts: list[int]
    chosen: Tensor


def _ranked(
    order: Order, numbers: Sequence[Tensor], among: Sequence[Tensor], counts: list[int]
) -> list[_Ranked]:
    """The ``counts`` largest of each tensor, or of all; ``among`` are bools, those that take part."""
    dtype: torch.dtype = functools.reduce(torch.promote_types, (x.dtype for x in numbers))
    bits = key_bits(order, dtype)
    shifts = [shift for shift, _ in digits(bits)]
    lowest = -(1 << (bits - 1)) if order == "number" else 0
    highest = lowest + (1 << bits) - 1
    keys = [_keys(order, storage_view(x).to(dtype)) for x in numbers]
    sizes = [key.numel() for key in keys]
    if len(counts) == len(numbers):
        pairs = list(zip(keys, among, counts, strict=True))
    else:
        pairs = [(torch.cat(keys), torch.cat(list(among)), counts[0])]
    thresholds, chosen = [], []
    for key, on, count in pairs:
        place = on.nonzero().view(-1)
        values, rank = key[place].sort(descending=True, stable=True)
        mask = torch.zeros_like(on)
        mask[place[rank[: max(count, 0)]]] = True
        chosen.append(mask)
        fits = 0 < count <= values.numel()
        thresholds.append(int(values[count - 1]) if fits else highest if count <= 0 else lowest)
    if len(pairs) != len(numbers):
        thresholds, chosen = thresholds * len(numbers), list(chosen[0].split(sizes))
    return [
        _Ranked(key, threshold, shifts, mask)
        for key, threshold, mask in zip(keys, thresholds, chosen, strict=True)
    ]


def _keys(order: Order, x: Tensor) -> Tensor:
    """int64 in the order of select_keys.py; of numbers less by the half of the range, so as to fit."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]
    infinity = int(torch.tensor(math.inf, dtype=x.dtype).view(integer))
    pattern = x.view(integer).long()
    magnitude = pattern & torch.iinfo(integer).max
    if order == "magnitude":
        return magnitude.clamp(max=infinity + 1)
    if order == "growth":
        return torch.where(magnitude > infinity, 0, magnitude + 1)
    signed = torch.where(pattern < 0, -magnitude, magnitude)
    return torch.where(magnitude > infinity, torch.iinfo(integer).min, signed)


def _moved(
    ranked: _Ranked,
    numbers: Tensor,
    among: Tensor,
    old: Tensor | None,
    zeroed: Sequence[Tensor],
    *,
    bits_ranked: int,
) -> int:
    """Bytes of a tensor in all passes of a ranking.

    Args:
        ranked, numbers, among: see :func:`_ranked`.
        old: the bits that are written over; None if nobody has written them.
        zeroed: weights and momentum, if they become zero where a bit changes.
        bits_ranked: masks that tell the second pass who takes part, and the old bits where those are others.
    """
    size, bits = numbers.element_size(), in_sectors(packed_length(numbers.numel()))
    states = [storage_view(tensor) != 0 for tensor in map(_pattern, zeroed)]
    ranks_zeroed = any(tensor is numbers for tensor in zeroed)
    total = min(bits_ranked, 1) * bits + in_groups(_groups(among), size)
    undecided = among
    for shift in ranked.shifts:
        first = shift == ranked.shifts[0]
        digit, chosen = ranked.keys >> shift, ranked.threshold >> shift
        still = undecided & (digit == chosen)
        lost = undecided & (digit < chosen)
        if shift == 0:
            still, lost = torch.zeros_like(still), undecided & ~ranked.chosen
        decided = undecided & ~still & ~lost
        touched = _groups(undecided)
        if first:  # who takes part is read; undecided and chosen bits are written
            total += (bits_ranked + 2) * bits
        else:  # the undecided read; of touched bytes bits read and written, and undecided ones
            total += bits + (3 if shift else 2) * _in_bytes(touched)
        if not ranks_zeroed:
            total += in_groups(touched, size)
        changed = lost if old is None else lost & old | decided & ~old
        for tensor, is_set in zip(zeroed, states, strict=True):
            read = _groups(changed) | touched & (tensor is numbers)
            total += in_groups(read, tensor.element_size())
            total += in_groups(_groups(changed & is_set), tensor.element_size())
        undecided = still
    return total


def _unpacked(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
    """The masks as bools, in storage order; without a kernel, so that any machine can count."""
    unpacked = []
    for weight, mask in zip(weights, masks, strict=True):
        bits = mask[:, None] >> torch.arange(GROUP.value, device=mask.device) & 1
        unpacked.append(bits.view(-1)[: weight.numel()].bool())
    return unpacked


def _pattern(x: Tensor) -> Tensor:
    """The same memory as integers: -0.0 is not zero."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def _groups(on: Tensor) -> Tensor:
    """Whether any of each group of eight is on."""
    padding = -on.numel() % GROUP.value
    return torch.nn.functional.pad(on, (0, padding)).view(-1, GROUP.value).any(1)


def _in_bytes(moved: Tensor) -> int:
    """Bytes of the sectors of those bytes of a mask that are moved, bool (groups,)."""
    padding = -moved.numel() % SECTOR
    sectors = torch.nn.functional.pad(moved, (0, padding)).view(-1, SECTOR).any(1)
    return SECTOR * int(sectors.sum())
