"""Bytes that operators move in CUDA C++, from masks and sizes: what their time is divided by.

Memory is moved by sectors of 32 bytes. Every pass is charged for the sectors that it reads and writes of
numbers, masks and bits in between; tables, histograms and segments stay in a cache. How many elements
the first bracket leaves undecided depends on their values: it is an argument. No ties are cut.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from granet_kernels.backends.cuda.select import SAMPLE_FROM

SECTOR = 32
GROUP = 8  # elements of a mask byte
SAMPLE_EVERY = 256  # SelectTraits::kSampleEvery
DIGIT_BITS = 12

UNDECIDED = 0.015
"""Of all elements: what six sigma on both sides are for 100 000 places and a fifth of the elements chosen."""


def masked_sgd_bytes(
    params: Sequence[Tensor], momenta: Sequence[Tensor], masks: Sequence[Tensor]
) -> int:
    """Sectors with an active weight: weight, gradient and momentum read, weight and momentum written."""
    total = 0
    for i, (param, mask) in enumerate(zip(params, masks, strict=True)):
        touched = _groups(param, mask)
        total += _bits(param) + 3 * _moved(touched, param.element_size())
        total += sum(2 * _moved(touched, speed.element_size()) for speed in momenta[i : i + 1])
    return total


def mask_cast_bytes(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> int:
    """Where a sector has an active weight it is read; all of the result is written."""
    read = _moved(_groups(weight, mask), weight.element_size())
    return _bits(weight) + read + _sectors(weight.numel() * dtype.itemsize)


def prune_bytes(
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    *,
    each: bool = False,
    undecided: float = UNDECIDED,
) -> int:
    """The ranking, in whose first pass all weights are read; then bits read, masks and what goes written."""
    total = _ranking(weights, each=each, undecided=undecided)
    for i, (weight, was, now) in enumerate(zip(weights, before, after, strict=True)):
        total += _dropped(weight, momenta[i : i + 1], was, now, now)
    return total


def drop_regrow_bytes(
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    scores: Sequence[Tensor],
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    *,
    undecided: float = UNDECIDED,
) -> int:
    """The masks counted, weights ranked and what is kept written, scores ranked, all applied.

    Exact where nothing regrows that was just dropped.
    """
    total = _ranking(weights, each=True, undecided=undecided)
    total += _ranking(scores, each=True, undecided=undecided)
    for i, (weight, was, now) in enumerate(zip(weights, before, after, strict=True)):
        bits = _bits(weight)
        total += bits + 4 * bits  # counted; kept: bits in between read, written, and read again
        total += _dropped(weight, momenta[i : i + 1], was, now, was & now)
    return total


def topk_mask_bytes(
    scores: Sequence[Tensor], *, each: bool = False, undecided: float = UNDECIDED
) -> int:
    """The ranking, which reads no masks; then bits read and masks written."""
    masks = sum(_bits(score) for score in scores)
    return _ranking(scores, each=each, undecided=undecided, masked=False) + 3 * masks


def _ranking(
    numbers: Sequence[Tensor], *, each: bool, undecided: float, masked: bool = True
) -> int:
    """A sample, or a first digit, of a segment; all of it once; then what is undecided."""
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in numbers))
    digits = math.ceil((8 * dtype.itemsize - 1) / DIGIT_BITS)
    together = sum(tensor.numel() for tensor in numbers)
    total = 0.0
    for tensor in numbers:
        bits, size = _bits(tensor), _sectors(tensor.nbytes)
        mask = bits * masked
        if (tensor.numel() if each else together) >= SAMPLE_FROM:
            total += tensor.numel() // SAMPLE_EVERY * SECTOR + mask
            narrow = 1
        else:
            total += size + mask
            narrow = digits - 2
        total += size + mask + 2 * bits
        # A pass over what is undecided reads its bits, and reads and writes those that change.
        total += narrow * (_touched(tensor, undecided) + 4 * bits)
    return int(total)


def _touched(tensor: Tensor, share: float) -> float:
    """Bytes of the sectors in which some of a share of the elements lie, if they lie anywhere."""
    in_sector = SECTOR // tensor.element_size()
    return _sectors(tensor.nbytes) * (1 - (1 - share) ** in_sector)


def _dropped(
    weight: Tensor, momenta: Sequence[Tensor], was: Tensor, now: Tensor, stays: Tensor
) -> int:
    """Bits in between and the mask read, the mask written, zeros where weights and momenta go."""
    lost, whole = _groups(weight, was & ~now), _groups(weight, ~stays)
    total = 4 * _bits(weight) + _moved(lost, weight.element_size())
    for momentum in momenta:
        total += _moved(whole, momentum.element_size()) + _moved(lost, momentum.element_size())
    return total


def _groups(tensor: Tensor, bits: Tensor) -> Tensor:
    """Which groups have a bit, bool (groups,)."""
    return bits[: -(-tensor.numel() // GROUP)] != 0


def _moved(groups: Tensor, itemsize: int) -> int:
    """Bytes of the sectors of those groups."""
    together = max(SECTOR // (GROUP * itemsize), 1)
    padded = torch.nn.functional.pad(groups, (0, -groups.numel() % together))
    return int(padded.view(-1, together).any(1).sum()) * together * GROUP * itemsize


def _bits(tensor: Tensor) -> int:
    return _sectors(-(-tensor.numel() // GROUP))


def _sectors(size: int) -> int:
    """Bytes of the sectors that so many consecutive bytes take."""
    return -(-size // SECTOR) * SECTOR
