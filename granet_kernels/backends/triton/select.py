"""Selection by rank; the caller has checked the arguments.

What is ranked together is a *segment*: one tensor, or all of them. There is a launch for each digit of
the keys (``select_keys.py``; fp32 has three, bf16 and fp16 two) and a last one, for everything
(``select_kernels.py``). The host reads nothing and launches the same kernels whatever the values are,
and all sums are of integers: a call can be captured in a CUDA graph, and repeats bit for bit.

The first launch and the second read all that takes part. With a first digit of 12 bits one to three of a
hundred weights are then undecided, in a tenth to a fifth of the groups of eight, which the third reads, and
the fourth next to nothing: that is two reads in all and a fifth, and as much of momenta as changes sides.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from granet_kernels.backends.composed import in_turn, on_copies
from granet_kernels.backends.triton.launch import DTYPES, GROUP, INTEGERS, launch
from granet_kernels.backends.triton.select_kernels import (
    STATE,
    _first_digit_kernel,
    _narrow_kernel,
    _settle_kernel,
)
from granet_kernels.backends.triton.select_keys import (
    CHUNK,
    DIGIT_BITS,
    Among,
    Order,
    Ranking,
    digits,
    key_bits,
)
from granet_kernels.backends.triton.table import ALIGNMENT, Table
from granet_kernels.layout import aligned, packed_length

IS_SHORT = DIGIT_BITS == 8  # before Triton 3.8, whose histograms take more registers
# At most one thread for each byte of a block: of more, several would read the same one.
WARPS = 8 if IS_SHORT else 16
FEW_REGISTERS, REGISTERS = (128, 255) if IS_SHORT else (64, 128)
"""Of a thread: few leave room for two programs on a multiprocessor, and are enough where accesses are wide
and nothing is fp64. Both are told the compiler, which otherwise takes 96 for some kernels, and spills in
others to keep to 64."""

# Lists of a table, the third where there are any. topk_mask has its scores in the place of weights.
WEIGHTS, MASKS, MOMENTA = range(3)


def prune_(
    weights: Sequence[Tensor], masks: Sequence[Tensor], k: Tensor, momenta: Sequence[Tensor]
) -> None:
    """Keep the ``k`` largest magnitudes among the active weights; zero the others and their momentum."""
    parts = _parts([weights, masks, *_if_any(momenta)], each=k.numel() == len(weights))
    state = _state(k.numel(), weights[0].device)
    zeroed = (WEIGHTS, MOMENTA) if momenta else (WEIGHTS,)
    wanted = _on(weights[0].device, k)
    _select(parts, "magnitude", "active", WEIGHTS, state, wanted, zeroed=zeroed)


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
    in_order = [
        aligned(score, like=weight).contiguous()
        for weight, score in zip(weights, scores, strict=True)
    ]
    lists = [weights, masks, *_if_any(momenta), in_order]
    parts = _parts(lists, each=True)
    state = _state(len(weights), weights[0].device)
    dropped = state.new_empty(len(weights))
    fraction = _on(weights[0].device, drop_fraction.view(1))
    _select(parts, "magnitude", "active", WEIGHTS, state, fraction, dropped, into_kept=True)
    zeroed = (WEIGHTS, MOMENTA) if momenta else (WEIGHTS,)
    _select(parts, "growth", "inactive", len(lists) - 1, state, dropped, zeroed=zeroed)


prune_drop_regrow_ = in_turn(prune_, drop_regrow_)
pruned_masks = on_copies(prune_)


def topk_mask(scores: Sequence[Tensor], k: Tensor) -> list[Tensor]:
    """Packed masks of the ``k`` largest scores, signed; NaN behind -inf."""
    masks = [
        torch.empty(packed_length(score.numel()), dtype=torch.uint8, device=score.device)
        for score in scores
    ]
    parts = _parts([scores, masks], each=k.numel() == len(scores))
    state = _state(k.numel(), scores[0].device)
    _select(parts, "number", "all", WEIGHTS, state, _on(scores[0].device, k))
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
    undecided: Tensor
    """Likewise, for those of whom it is not known yet."""


def _parts(lists: Sequence[Sequence[Tensor]], *, each: bool) -> list[_Part]:
    """The tables of the lists. A segment is a tensor if ``each``, otherwise all of them."""
    count = len(lists[0])
    chunks = [triton.cdiv(tensor.numel(), CHUNK.value) for tensor in lists[0]]
    places = [0, *itertools.accumulate(chunks)][:count]
    segments, starts, lengths = (
        (list(range(count)), places, chunks)
        if each
        else ([0] * count, [0] * count, [sum(chunks)] * count)
    )
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
            [[column[i] for i in members] for column in (segments, places, starts, lengths)],
        )
        room = table.chunks * CHUNK.value // GROUP.value
        bits = torch.empty(2, room, dtype=torch.uint8, device=lists[0][0].device)
        parts.append(_Part(dtypes, is_whole, table, *bits.unbind()))
    return parts


def _state(segments: int, device: torch.device) -> Tensor:
    """Of all segments, int64 (segments, STATE); what one selection leaves another can begin with."""
    return torch.zeros(segments, STATE.value, dtype=torch.int64, device=device)


def _select(
    parts: Sequence[_Part],
    order: Order,
    among: Among,
    numbers: int,
    state: Tensor,
    wanted: Tensor,
    dropped: Tensor | None = None,
    *,
    into_kept: bool = False,
    zeroed: Sequence[int] = (),
) -> None:
    """Choose of each segment the largest, and write their bits; +0.0 where a list is ``zeroed``.

    Args:
        parts: all tensors.
        order, among: as in :class:`Ranking`.
        numbers: the list that is ranked.
        state: see :func:`_state`.
        wanted: int64 (segments,), how many to choose of each; all that take part, where those are fewer.
        dropped: int64 (segments,); if given, p times those that take part are not chosen, where p is
            ``wanted``, fp64, and this is filled with how many that are.
        into_kept: write the bits beside the masks.
        zeroed: lists that are to be +0.0 where a bit changes.
    """
    compared_in = functools.reduce(torch.promote_types, (part.dtypes[numbers] for part in parts))
    passes = digits(key_bits(order, compared_in))
    shift, values = passes[0]
    ranked = [(part, _ranking(part, order, among, numbers, compared_in)) for part in parts]
    for part, by in ranked:
        _run(_first_digit_kernel, part, by, part.kept, state, wanted, dropped, shift, VALUES=values)
    chunks = sum(part.table.chunks for part in parts)
    tied = state.new_empty(chunks, passes[-1][1], dtype=torch.int32)
    tied_before = state.new_empty(chunks)
    for (chosen, _), (shift, values) in itertools.pairwise(passes):
        for part, by in ranked:
            _run(
                _narrow_kernel,
                part,
                by,
                part.kept,
                part.undecided,
                state,
                tied,
                tied_before,
                chosen,
                shift,
                VALUES=values,
                FIRST=chosen == passes[0][0],
                LAST=shift == 0,
                INTO_KEPT=into_kept,
                ZEROED=_integers(part, zeroed),
            )
    for part, by in ranked:
        _run(
            _settle_kernel,
            part,
            by,
            part.kept,
            part.undecided,
            state,
            tied_before,
            INTO_KEPT=into_kept,
            ZEROED=_integers(part, zeroed),
        )


def _ranking(
    part: _Part, order: Order, among: Among, numbers: int, compared_in: torch.dtype
) -> Ranking:
    return Ranking(
        order=order,
        among=among,
        numbers=numbers,
        dtype=DTYPES[part.dtypes[numbers]],
        compared_in=DTYPES[compared_in],
        lists=len(part.dtypes),
        aligned=part.table.aligned,
        whole=part.whole,
    )


def _integers(part: _Part, lists: Sequence[int]) -> tuple[tuple[int, tl.dtype], ...]:
    """The lists, and integers as wide as their elements."""
    return tuple((i, INTEGERS[part.dtypes[i].itemsize]) for i in lists)


def _run(kernel: object, part: _Part, by: Ranking, *args: object, **meta: object) -> None:
    """A program for each chunk of a part."""
    table = part.table
    is_small = by.aligned and by.whole and not any(dtype.itemsize > 4 for dtype in part.dtypes)
    is_small &= not (IS_SHORT and meta.get("LAST", False))  # it spills, and reads little
    registers = FEW_REGISTERS if is_small else REGISTERS
    meta |= {"BY": by, "num_warps": WARPS, "maxnreg": registers}
    launch(kernel, table.chunks, table.rows, table.owners, *args, **meta)


def _on(device: torch.device, numbers: Tensor) -> Tensor:
    """The numbers on the device; those on the host travel as arguments of kernels."""
    if numbers.device == device:
        return numbers
    copy = torch.empty_like(numbers, device=device)
    for i, number in enumerate(numbers.tolist()):
        copy[i].fill_(number)
    return copy


def _if_any(tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    return [tensors] if tensors else []
