"""Bytes that operators move in CUDA C++, from masks and sizes: what their time is divided by.

Memory is moved by sectors of 32 bytes. Every launch is charged for the sectors that it reads and writes of
numbers, masks and bits in between; tables, histograms and segments stay in a cache. How many elements
the first bracket leaves undecided depends on their values: it is an argument. No ties are cut. A card
may fetch more: an H100 reads sectors in pairs, and reads what it is to write a part of.
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
DIGIT_BITS = 12
SAMPLES, DENSEST, SPARSEST = 1 << 14, 16, 256  # SelectTraits

UNDECIDED = 0.015
"""Of all elements: what six sigma on both sides are for 100 000 places and a fifth of the elements chosen."""


def masked_sgd_bytes(
    params: Sequence[Tensor],
    momenta: Sequence[Tensor],
    masks: Sequence[Tensor],
    averages: Sequence[Tensor] = (),
) -> int:
    """Sectors with an active weight: all that there is of it is read, and written but for the gradient."""
    total = 0
    for i, (param, mask) in enumerate(zip(params, masks, strict=True)):
        touched = _groups(param, mask)
        total += _bits(param) + 3 * _moved(touched, param.element_size())
        for companion in (*momenta[i : i + 1], *averages[i : i + 1]):
            total += 2 * _moved(touched, companion.element_size())
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
    """The active weights ranked; bits read, masks read and written, zeros where one changes."""
    total = _ranking(weights, before, each=each, undecided=undecided)
    for i, (weight, was, now) in enumerate(zip(weights, before, after, strict=True)):
        total += 4 * _bits(weight) + _changed([weight, *momenta[i : i + 1]], was ^ now)
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
    others = [~(was & now) for was, now in zip(before, after, strict=True)]
    total = _ranking(weights, before, each=True, undecided=undecided)
    total += _ranking(scores, others, each=True, undecided=undecided)
    for i, (weight, was, now) in enumerate(zip(weights, before, after, strict=True)):
        total += (1 + 3 + 5) * _bits(weight) + _changed([weight, *momenta[i : i + 1]], was ^ now)
    return total


def topk_mask_bytes(
    scores: Sequence[Tensor], *, each: bool = False, undecided: float = UNDECIDED
) -> int:
    """The ranking, which reads no masks; then bits read and masks written."""
    masks = sum(_bits(score) for score in scores)
    return _ranking(scores, None, each=each, undecided=undecided) + 3 * masks


def _ranking(
    numbers: Sequence[Tensor],
    taking_part: Sequence[Tensor] | None,
    *,
    each: bool,
    undecided: float,
) -> int:
    """A sample, or a first digit, of a segment; all that take part once; then what is undecided.

    ``taking_part``: packed masks, or None for all.
    """
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in numbers))
    digits = math.ceil((8 * dtype.itemsize - 1) / DIGIT_BITS)
    together = sum(tensor.numel() for tensor in numbers)
    total = 0.0
    for i, tensor in enumerate(numbers):
        bits, segment = _bits(tensor), tensor.numel() if each else together
        once = _sectors(tensor.nbytes)
        if taking_part is not None:
            once = bits + _moved(_groups(tensor, taking_part[i]), tensor.element_size())
        if segment >= SAMPLE_FROM:
            sectors = SECTOR * (1 if taking_part is None else 2)  # of the number, and of its bit
            total += tensor.numel() // _distance(segment) * sectors
            narrow = 1
        else:
            total += once
            narrow = digits - 2
        total += once + 2 * bits
        # A pass over what is undecided reads its bits, and reads and writes those that change.
        total += narrow * (_touched(tensor, undecided) + 4 * bits)
    return int(total)


def _distance(segment: int) -> int:
    """One of so many elements is sampled."""
    distance = DENSEST
    while distance < SPARSEST and distance * SAMPLES < segment:
        distance *= 2
    return distance


def _touched(tensor: Tensor, share: float) -> float:
    """Bytes of the sectors in which some of a share of the elements lie, if they lie anywhere."""
    in_sector = SECTOR // tensor.element_size()
    return _sectors(tensor.nbytes) * (1 - (1 - share) ** in_sector)


def _changed(tensors: Sequence[Tensor], changed: Tensor) -> int:
    """The sectors that are written because a bit changes."""
    return sum(_moved(_groups(tensor, changed), tensor.element_size()) for tensor in tensors)


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
