"""Selection by rank; the caller has checked the arguments.

What is ranked together is a *segment*: one tensor, or all of them. Digit by digit of the keys
(``select_keys.py``) a histogram narrows down the segment's threshold; then one pass writes the
masks, and zeros where weights and momenta are not zero yet. The host reads nothing and launches the
same kernels whatever the values are, and all sums are of integers: a call can be captured in a
CUDA graph, and repeats bit for bit.

Bytes read for each number of n bytes that takes part: n for each digit (3 for fp32, 2 for bf16 and
fp16, 6 for fp64; before Triton 3.8: 4, 2, 8), n in the last pass, and n more where ties are cut, each
with an eighth of a byte of mask; where a whole group of eight takes no part, only its byte. The
last pass also reads weights and momenta, all but the groups that stay whole, and writes the groups
that change.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from granet_kernels.backends.triton.launch import DTYPES, GROUP, INTEGERS, launch
from granet_kernels.backends.triton.mask import count_active
from granet_kernels.backends.triton.select_kernels import (
    BINS,
    STATE,
    WANTED,
    _apply_kernel,
    _choose_kernel,
    _count_tied_kernel,
    _histogram_kernel,
)
from granet_kernels.backends.triton.select_keys import (
    CHUNK,
    Among,
    Order,
    Ranking,
    digits,
    key_bits,
)
from granet_kernels.backends.triton.table import ALIGNMENT, Table
from granet_kernels.layout import aligned, packed_length

WARPS = 8  # 16 numbers to a thread: more leave room for fewer programs on a multiprocessor

# Lists of a table, the third where there are any. topk_mask has its scores in the place of weights.
WEIGHTS, MASKS, MOMENTA = range(3)


def prune_(
    weights: Sequence[Tensor], masks: Sequence[Tensor], k: Tensor, momenta: Sequence[Tensor]
) -> None:
    """Keep the ``k`` largest magnitudes among the active weights; zero the rest and their momentum."""
    parts = _parts([weights, masks, *_if_any(momenta)], each=k.numel() == len(weights))
    choice = _choose(parts, "magnitude", "active", WEIGHTS, _on(weights[0].device, k))
    _apply(choice, zeroed=(WEIGHTS, MOMENTA) if momenta else (WEIGHTS,))


def drop_regrow_(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    scores: Sequence[Tensor],
    drop_fraction: Tensor,
    momenta: Sequence[Tensor],
) -> None:
    """In each tensor drop the ceil(p * active) smallest magnitudes, regrow as many by largest |score|.

    What is kept is first written beside the masks: they still tell which of the weights that regrow
    were active before, and need not start from zero.
    """
    active = count_active(masks)
    dropped = _ceil_of_product(drop_fraction, active)
    in_order = [
        aligned(score, like=weight).contiguous()
        for weight, score in zip(weights, scores, strict=True)
    ]
    lists = [weights, masks, *_if_any(momenta), in_order]
    parts = _parts(lists, each=True)
    choice = _choose(parts, "magnitude", "active", WEIGHTS, active - dropped)
    _apply(choice, into_kept=True)
    choice = _choose(parts, "growth", "inactive", len(lists) - 1, dropped)
    _apply(choice, zeroed=(WEIGHTS, MOMENTA) if momenta else (WEIGHTS,))


def topk_mask(scores: Sequence[Tensor], k: Tensor) -> list[Tensor]:
    """Packed masks of the ``k`` largest scores, signed; NaN behind -inf."""
    masks = [
        torch.empty(packed_length(score.numel()), dtype=torch.uint8, device=score.device)
        for score in scores
    ]
    parts = _parts([scores, masks], each=k.numel() == len(scores))
    _apply(_choose(parts, "number", "all", WEIGHTS, _on(scores[0].device, k)))
    return masks


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Tensors that one launch serves: of the same dtypes, and alike in what makes accesses wide."""

    dtypes: tuple[torch.dtype, ...]
    """Of each list."""
    whole: bool
    """Whether all have a multiple of eight elements."""
    table: Table
    kept: Tensor
    """Bits of all chunks, for what is kept before anything regrows."""


@dataclass(frozen=True, slots=True, eq=False)
class _Choice:
    """Who stays, as thresholds on the device."""

    parts: list[tuple[_Part, Ranking]]
    state: Tensor
    """int64 (segments, STATE)."""
    tied_before: Tensor
    """int64 (chunks,): tied elements in the chunks in front of each."""


def _parts(lists: Sequence[Sequence[Tensor]], *, each: bool) -> list[_Part]:
    """The tables of the lists. A segment is a tensor if ``each``, otherwise all of them."""
    count = len(lists[0])
    chunks = [triton.cdiv(tensor.numel(), CHUNK.value) for tensor in lists[0]]
    places = [0, *itertools.accumulate(chunks)][:count]
    segments, starts = (list(range(count)), places) if each else ([0] * count, [0] * count)
    alike: dict[tuple[tuple[torch.dtype, ...], bool, bool], list[int]] = {}
    for i, tensors in enumerate(zip(*lists, strict=True)):
        dtypes = tuple(tensor.dtype for tensor in tensors)
        is_whole = tensors[0].numel() % GROUP.value == 0
        is_aligned = all(tensor.data_ptr() % ALIGNMENT.value == 0 for tensor in tensors)
        alike.setdefault((dtypes, is_whole, is_aligned), []).append(i)
    parts = []
    for (dtypes, is_whole, _), members in alike.items():
        table = Table.of(
            [[tensors[i] for i in members] for tensors in lists],
            CHUNK.value,
            [[column[i] for i in members] for column in (segments, places, starts)],
        )
        room = table.chunks * CHUNK.value // GROUP.value
        kept = torch.empty(room, dtype=torch.uint8, device=lists[0][0].device)
        parts.append(_Part(dtypes, is_whole, table, kept))
    return parts


def _choose(
    parts: Sequence[_Part], order: Order, among: Among, numbers: int, wanted: Tensor
) -> _Choice:
    """Of each segment the threshold above which ``wanted`` elements lie, or at which they are tied.

    Args:
        parts: all tensors.
        order, among: as in :class:`Ranking`.
        numbers: the list that is ranked.
        wanted: int64 (segments,), how many to choose of each; all that take part, where those are fewer.
    """
    compared_in = functools.reduce(torch.promote_types, (part.dtypes[numbers] for part in parts))
    ranked = [
        (
            part,
            Ranking(
                order=order,
                among=among,
                numbers=numbers,
                dtype=DTYPES[part.dtypes[numbers]],
                compared_in=DTYPES[compared_in],
                lists=len(part.dtypes),
                aligned=part.table.aligned,
                whole=part.whole,
            ),
        )
        for part in parts
    ]
    segments = wanted.numel()
    state = wanted.new_zeros(segments, STATE.value)
    state[:, WANTED.value] = wanted
    histograms = wanted.new_zeros(segments, BINS.value)
    for shift, values in digits(key_bits(order, compared_in)):
        for part, ranking in ranked:
            _run(_histogram_kernel, part, ranking, state, histograms, shift, values)
        launch(_choose_kernel, segments, state, histograms, shift, values, num_warps=WARPS)
    tied = wanted.new_empty(sum(part.table.chunks for part in parts))
    for part, ranking in ranked:
        _run(_count_tied_kernel, part, ranking, state, tied)
    return _Choice(ranked, state, tied.cumsum(0) - tied)


def _apply(choice: _Choice, *, into_kept: bool = False, zeroed: Sequence[int] = ()) -> None:
    """Write the bits of what is chosen, and +0.0 in the lists ``zeroed`` where it is not."""
    for part, ranking in choice.parts:
        _run(
            _apply_kernel,
            part,
            ranking,
            choice.state,
            choice.tied_before,
            INTO_KEPT=into_kept,
            ZEROED=tuple((i, INTEGERS[part.dtypes[i].itemsize]) for i in zeroed),
        )


def _run(kernel: object, part: _Part, ranking: Ranking, *args: object, **meta: object) -> None:
    """A program for each chunk of a part."""
    table = part.table
    launch(
        kernel,
        table.chunks,
        table.rows,
        table.owners,
        part.kept,
        *args,
        BY=ranking,
        num_warps=WARPS,
        **meta,
    )


def _on(device: torch.device, counts: Tensor) -> Tensor:
    """The counts on the device; those on the host travel as arguments of kernels."""
    if counts.device == device:
        return counts
    copy = torch.empty_like(counts, device=device)
    for i, count in enumerate(counts.tolist()):
        copy[i].fill_(count)
    return copy


def _ceil_of_product(fraction: Tensor, counts: Tensor) -> Tensor:
    """ceil(p * count), the product one IEEE double; p outside [0, 1] counts as the nearer end, NaN as 0."""
    if fraction.device != counts.device:
        fraction = torch.full((), float(fraction), dtype=fraction.dtype, device=counts.device)
    p = fraction.view(()).nan_to_num(nan=0.0).clamp(0.0, 1.0)
    return (p * counts.double()).ceil().long()


def _if_any(tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    return [tensors] if tensors else []
