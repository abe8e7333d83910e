"""Selection by rank on the device: histogram, choose, count what is tied, apply.

The *state* of a segment, the elements that are ranked together, is a row of three integers. Digit by
digit of the keys :func:`_histogram_kernel` counts and :func:`_choose_kernel` decides. Then the threshold
is a whole key, and every element knows its fate but those that are tied at it. Of these the first
``WANTED`` stay: the rank of one is the number of those in front of its chunk and in front of it there.
"""

from __future__ import annotations

import triton.language as tl
from triton import jit

from granet_kernels.backends.triton.groups import is_active, repeated
from granet_kernels.backends.triton.launch import GROUP
from granet_kernels.backends.triton.select_keys import (
    BLOCK,
    CHUNK,
    DIGIT_BITS,
    PLACE,
    SEGMENT,
    START,
    block,
    bytes_of,
    elements_left,
    keys_of_block,
    load_bytes,
    mask_of_block,
    store_bytes,
    width,
)
from granet_kernels.backends.triton.table import ADDRESSES, address, locate

BINS = tl.constexpr(1 << DIGIT_BITS)

# Columns of the state.
THRESHOLD = tl.constexpr(0)  # the digits chosen so far, and zeros
WANTED = tl.constexpr(1)  # how many are still to be chosen, of those that have these digits
TIED = tl.constexpr(2)  # how many have them
STATE = tl.constexpr(3)


@jit
def column(row, COLUMN: tl.constexpr, BY: tl.constexpr):
    """One of the integers behind the lists."""
    return tl.load(row + ADDRESSES + BY.lists + COLUMN)


@jit
def kept_of_chunk(kept):
    """The program's bytes in the mask of those that stay anyway, which has a place for every chunk."""
    return kept + tl.program_id(0).to(tl.int64) * (CHUNK // GROUP)


@jit(do_not_specialize=("shift", "values"))
def _histogram_kernel(rows, owners, kept, state, histograms, shift, values, BY: tl.constexpr):
    """histogram[segment, digit] += the elements that take part and have the digits chosen so far.

    These are the keys that differ from the threshold by less than one of the digits above would.
    """
    row, start, numel = locate(rows, owners, width(BY), CHUNK)
    kept = kept_of_chunk(kept)
    segment = column(row, SEGMENT, BY)
    threshold = tl.load(state + segment * STATE + THRESHOLD)
    counts = tl.zeros([BINS], tl.int32)
    for first in range(start, tl.minimum(start + CHUNK, numel), BLOCK):
        left = elements_left(first, numel, BY)
        key, takes_part = keys_of_block(row, kept + (first - start) // GROUP, first, left, BY)
        digit = (key ^ threshold.to(key.dtype)) >> shift.to(key.dtype)
        counted = takes_part & (digit < values.to(key.dtype))
        digit = tl.ravel(digit.to(tl.int32), can_reorder=True)
        counts += tl.histogram(digit, BINS, mask=tl.ravel(counted, can_reorder=True))
    bins = histograms + segment * BINS + tl.arange(0, BINS)
    tl.atomic_add(bins, counts.to(tl.int64), mask=counts != 0, sem="relaxed")


@jit(do_not_specialize=("shift", "values"))
def _choose_kernel(state, histograms, shift, values):
    """The digit at which the count from above reaches what is wanted; the histogram is cleared.

    Where nothing is wanted it is the largest, for no key has all bits set; where more are wanted than
    there are it is 0, the smallest.
    """
    segment = tl.program_id(0).to(tl.int64)
    row = state + segment * STATE
    digit = tl.arange(0, BINS)
    count = tl.load(histograms + segment * BINS + digit)
    tl.store(histograms + segment * BINS + digit, tl.zeros_like(count))
    above = tl.sum(count) - tl.cumsum(count)
    wanted = tl.load(row + WANTED)
    is_chosen = (above < wanted) & (wanted <= above + count)
    chosen = tl.where(wanted > 0, tl.sum(tl.where(is_chosen, digit, 0)), values - 1)
    tl.store(row + THRESHOLD, tl.load(row + THRESHOLD) | chosen.to(tl.int64) << shift)
    tl.store(row + WANTED, wanted - tl.sum(tl.where(is_chosen, above, 0)))
    tl.store(row + TIED, tl.sum(tl.where(is_chosen, count, 0)))


@jit
def _count_tied_kernel(rows, owners, kept, state, tied, BY: tl.constexpr):
    """tied[chunk] = how many of its elements are at the threshold; 0, unread, where all such stay."""
    row, start, numel = locate(rows, owners, width(BY), CHUNK)
    kept = kept_of_chunk(kept)
    choice = state + column(row, SEGMENT, BY) * STATE
    threshold = tl.load(choice + THRESHOLD)
    count = tl.zeros([], tl.int32)
    if tl.load(choice + WANTED) < tl.load(choice + TIED):
        for first in range(start, tl.minimum(start + CHUNK, numel), BLOCK):
            left = elements_left(first, numel, BY)
            key, takes_part = keys_of_block(row, kept + (first - start) // GROUP, first, left, BY)
            count += number_of(takes_part & (key == threshold.to(key.dtype)))
    tl.store(tied + column(row, PLACE, BY) + start // CHUNK, count.to(tl.int64))


@jit
def _apply_kernel(
    rows,
    owners,
    kept,
    state,
    tied_before,
    BY: tl.constexpr,
    INTO_KEPT: tl.constexpr,
    ZEROED: tl.constexpr,
):
    """Set the bits of what is chosen, in ``kept`` or in the masks; there also those that are kept.

    Then +0.0 in the lists ZEROED, (list, integer of its width) each, where the bit is not set or was
    not. ``tied_before`` counts for each chunk of all tensors what is tied in those in front of it.
    """
    row, start, numel = locate(rows, owners, width(BY), CHUNK)
    kept = kept_of_chunk(kept)
    choice = state + column(row, SEGMENT, BY) * STATE
    threshold = tl.load(choice + THRESHOLD)
    wanted = tl.load(choice + WANTED)
    some_go = wanted < tl.load(choice + TIED)
    wanted -= tl.load(tied_before + column(row, PLACE, BY) + start // CHUNK)
    wanted += tl.load(tied_before + column(row, START, BY))
    for first in range(start, tl.minimum(start + CHUNK, numel), BLOCK):
        left = elements_left(first, numel, BY)
        kept_here = kept + (first - start) // GROUP
        key, takes_part = keys_of_block(row, kept_here, first, left, BY)
        tied = takes_part & (key == threshold.to(key.dtype))
        if some_go:
            count = number_of(tied)
            tied &= ranks(tied) < wanted
            wanted -= count
        byte = bytes_of(tied | takes_part & (key > threshold.to(key.dtype)))
        if INTO_KEPT:
            store_bytes(kept_here, byte, left)
        else:
            mask = mask_of_block(row, first, BY)
            stays = byte
            if BY.among == "inactive":
                byte |= load_bytes(kept_here, left)
                stays = byte & load_bytes(mask, left)
            store_bytes(mask, byte, left)
            for i in tl.static_range(len(ZEROED)):
                values = address(row, ZEROED[i][0], ZEROED[i][1], BY.aligned) + first
                zero_unless(stays, values, left)


@jit
def number_of(on):
    """How many of a block's elements are set."""
    return tl.sum(tl.sum(on.to(tl.int32), axis=1), axis=0)


@jit
def ranks(on):
    """How many of a block's elements are set in front of each."""
    ones = on.to(tl.int32)
    of_group = tl.sum(ones, axis=1)
    in_front = tl.cumsum(of_group, axis=0) - of_group
    return in_front[:, None] + tl.cumsum(ones, axis=1) - ones


@jit
def zero_unless(stays, pointer, left):
    """+0.0 where the bit is not set; a group in which that changes nothing is not written."""
    byte = repeated(stays)
    element, inside = block(left)
    old = tl.load(pointer + element, mask=(byte != 0xFF) & inside, other=0)
    new = tl.where(is_active(byte), old, 0)
    changes = repeated(tl.max((old != new).to(tl.int32), axis=1))
    tl.store(pointer + element, new, mask=(changes != 0) & inside)
