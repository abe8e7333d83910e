"""Bytes that the operators' kernels move, from masks and sizes alone: what their time is divided by.

Memory is fetched and written back by *sectors* of 32 bytes. A launch is charged for each sector of
the operator's tensors and masks that it reads and for each that it writes, once, and a call for all
of its launches. Left out are tables, histograms and thresholds: some kilobytes, which stay in a
cache. Tensors are taken to begin at multiples of 32 bytes, and an incomplete group of eight at the
end of one as a whole group. ``masks`` are packed; calling these waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from granet_kernels.backends.triton.launch import GROUP
from granet_kernels.backends.triton.select_keys import Order, digits, key_bits
from granet_kernels.layout import packed_length

SECTOR = 32
FULL = 0xFF


def masked_sgd_bytes(
    params: Sequence[Tensor], momenta: Sequence[Tensor], masks: Sequence[Tensor]
) -> int:
    """Groups with an active weight: weight, gradient and momentum read, weight and momentum written."""
    total = 0
    for i, (param, mask) in enumerate(zip(params, masks, strict=True)):
        touched = group_bytes(param, mask) != 0
        total += in_sectors(touched.numel()) + 3 * in_groups(touched, param.element_size())
        if momenta:
            total += 2 * in_groups(touched, momenta[i].element_size())
    return total


def mask_cast_bytes(
    weight: Tensor, mask: Tensor, dtype: torch.dtype, *, dense: bool = False
) -> int:
    """Groups with an active weight, or all where the gradient is ``dense``, read; all written.

    Also of ``mask_grad``, with the gradient in the place of the weight, where both have one layout.
    """
    byte = group_bytes(weight, mask)
    read = in_groups((byte != 0) | dense, weight.element_size())
    return in_sectors(byte.numel()) + read + in_sectors(weight.numel() * dtype.itemsize)


def zero_inactive_bytes(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> int:
    """Groups that are not wholly active written, and those of them with an active element read."""
    total = 0
    for tensor, mask in zip(tensors, masks, strict=True):
        byte, size = group_bytes(tensor, mask), tensor.element_size()
        written = byte != FULL
        total += in_sectors(byte.numel()) + in_groups(written, size)
        total += in_groups(written & (byte != 0), size)
    return total


def pack_mask_bytes(numel: int) -> int:
    """A byte an element read, a bit written."""
    return in_sectors(numel) + in_sectors(packed_length(numel))


def unpack_mask_bytes(numel: int) -> int:
    """A bit an element read, a byte written."""
    return in_sectors(-(-numel // GROUP.value)) + in_sectors(numel)


def count_active_bytes(masks: Sequence[Tensor]) -> int:
    """The masks read."""
    return sum(in_sectors(mask.numel()) for mask in masks)


def prune_bytes(
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    *,
    ties: bool = False,
) -> int:
    """For each digit of a key the groups with an active weight read; then everything, once.

    Where ``ties`` are cut the groups are read once more. Groups that lose a weight are written, those of
    momentum too, which is read in the groups that do not stay whole.
    """
    passes = _digits("magnitude", weights) + ties
    total = 0
    for i, (weight, was, now) in enumerate(zip(weights, before, after, strict=True)):
        old, new, size = group_bytes(weight, was), group_bytes(weight, now), weight.element_size()
        loses = (old & ~new) != 0
        total += (passes + 2) * in_sectors(was.numel()) + passes * in_groups(old != 0, size)
        total += in_groups((old != 0) | (new != FULL), size) + in_groups(loses, size)
        if momenta:
            size = momenta[i].element_size()
            total += in_groups(new != FULL, size) + in_groups(loses, size)
    return total


def drop_regrow_bytes(
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    scores: Sequence[Tensor],
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    *,
    ties: int = 0,
) -> int:
    """The masks counted; the weights ranked and what is kept written; scores ranked; all applied.

    Exact where nothing regrows that was just dropped: the masks do not tell it from what was kept.
    ``ties``: in how many of the two rankings some are cut.
    """
    of_weights, of_scores = _digits("magnitude", weights) + 1, _digits("growth", scores) + 1
    total = count_active_bytes(before)
    for i, (weight, score, was, now) in enumerate(zip(weights, scores, before, after, strict=True)):
        old, new = group_bytes(weight, was), group_bytes(weight, now)
        kept, size = old & new, weight.element_size()
        drops, can_grow = (old & ~new) != 0, kept != FULL
        bits = in_sectors(was.numel())
        # Weights: mask and groups in each pass, what is kept written in the last.
        total += of_weights * (bits + in_groups(old != 0, size)) + bits
        # Scores: likewise by what is kept, and the mask read and written in the last.
        total += of_scores * (bits + in_groups(can_grow, score.element_size())) + 2 * bits
        if ties > 0:
            total += bits + in_groups(old != 0, size)
        if ties > 1:
            total += bits + in_groups(can_grow, score.element_size())
        for state in (weight, *momenta[i : i + 1]):
            total += in_groups(can_grow, state.element_size())
            total += in_groups(drops, state.element_size())
    return total


def topk_mask_bytes(scores: Sequence[Tensor], *, ties: bool = False) -> int:
    """The scores read for each digit and once more, twice where ``ties`` are cut; the masks written."""
    passes = _digits("number", scores) + 1 + ties
    return sum(
        passes * in_sectors(score.numel() * score.element_size())
        + in_sectors(packed_length(score.numel()))
        for score in scores
    )


def group_bytes(tensor: Tensor, mask: Tensor) -> Tensor:
    """The bytes of a mask without its padding: one for each group of eight elements."""
    return mask[: -(-tensor.numel() // GROUP.value)]


def in_sectors(size: int) -> int:
    """Bytes of the sectors that so many consecutive bytes take."""
    return -(-size // SECTOR) * SECTOR


def in_groups(moved: Tensor, itemsize: int) -> int:
    """Bytes of the sectors of those groups that are moved, bool (groups,)."""
    size: int = GROUP.value * itemsize
    if size >= SECTOR:
        return int(moved.sum()) * size
    together = SECTOR // size  # groups in a sector
    padding = -moved.numel() % together
    sectors = torch.nn.functional.pad(moved, (0, padding)).view(-1, together).any(1)
    return int(sectors.sum()) * SECTOR


def _digits(order: Order, ranked: Sequence[Tensor]) -> int:
    """How many passes find the threshold."""
    dtype: torch.dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in ranked))
    return len(digits(key_bits(order, dtype)))
