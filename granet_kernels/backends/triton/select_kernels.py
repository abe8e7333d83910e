"""Selection by rank on the device: count, narrow down, settle.

Digit by digit of the keys a threshold is found for each segment, the elements that are ranked together.
Each digit is counted by one launch, and the program that is the last of its segment to have counted
chooses. The next launch decides whoever differs from the threshold in that digit, and counts the
following one among those who do not: the *undecided*, whose bits are kept beside the masks, so that only
their groups are read again. When all digits are chosen, what is tied at the threshold goes by position.
"""

from __future__ import annotations

import triton.language as tl
from triton import constexpr_function, jit

from granet_kernels.backends.triton.groups import is_active, repeated
from granet_kernels.backends.triton.launch import GROUP
from granet_kernels.backends.triton.select_keys import (
    BLOCK,
    CHUNK,
    CHUNKS,
    DIGIT_BITS,
    PLACE,
    SEGMENT,
    START,
    block,
    bytes_left,
    bytes_of,
    elements_left,
    keys_of_block,
    load_bytes,
    mask_of_block,
    packed_bytes,
    store_bytes,
    taking_part,
    width,
)
from granet_kernels.backends.triton.table import ADDRESSES, address, locate

# Columns of a segment's state, int64.
THRESHOLD = tl.constexpr(0)  # the digits chosen so far, and zeros
WANTED = tl.constexpr(1)  # how many are still to be chosen, of those that have these digits
TIED = tl.constexpr(2)  # how many have them
ARRIVED = tl.constexpr(3)  # how many programs have counted; 0 between launches
HISTOGRAM = tl.constexpr(4)  # of the next digit; zeros between launches
STATE = tl.constexpr(4 + (1 << DIGIT_BITS))

TOGETHER = tl.constexpr(1024)  # chunks whose tied elements are added up at once
ROW = tl.constexpr(16)  # digits that are first looked at as one


@jit(do_not_specialize=("shift",), do_not_specialize_on_alignment=("wanted",))
def _first_digit_kernel(
    rows, owners, kept, state, wanted, dropped, shift, BY: tl.constexpr, VALUES: tl.constexpr
):
    """Count the first digit of all that take part, and choose.

    Args:
        kept: bits of those that stay anyway, a place for each chunk.
        wanted: int64 (segments,), how many to choose; or where there is ``dropped`` an fp64 fraction p.
        dropped: int64 (segments,), filled with ceil(p * those that take part); the rest is chosen.
        shift: what is above is the digit.
    """
    row, start, numel = locate(rows, owners, width(BY), CHUNK)
    counts = tl.zeros([VALUES], tl.int32)
    offset, size = 0, tl.minimum(numel - start, CHUNK).to(tl.int32)
    while offset < size:
        first, left = start + offset, elements_left(size - offset, BY)
        byte = taking_part(row, place_in(kept, offset), first, left, BY)
        key, on = keys_of_block(row, byte, first, left, BY)
        counts += histogram(key >> shift.to(key.dtype), on, VALUES)
        offset += BLOCK
    segment = column(row, SEGMENT, BY)
    state += segment * STATE
    if is_last_to_add(counts, state, column(row, CHUNKS, BY)):
        totals = totals_of_rows(state, VALUES)
        if dropped is None:
            number = tl.load(wanted + segment)
        else:
            active = tl.sum(totals)
            number = ceil_of_product(tl.load(wanted), active)
            tl.store(dropped + segment, number)
            number = active - number
        choose(totals, number, 0, shift, state, VALUES)


@jit(do_not_specialize=("chosen", "shift"))
def _narrow_kernel(
    rows,
    owners,
    kept,
    undecided,
    state,
    tied,
    tied_before,
    chosen,
    shift,
    BY: tl.constexpr,
    VALUES: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    INTO_KEPT: tl.constexpr,
    ZEROED: tl.constexpr,
):
    """Decide who differs from the threshold; count the next digit of the others, and choose.

    Args:
        undecided: bits of those that did not differ, a place for each chunk; on the FIRST pass all that
            take part are undecided.
        tied: int32 (chunks of all tensors, VALUES), each chunk's own histogram of the last digit.
        tied_before: int64 (chunks of all tensors,), filled with how many are tied in front of each; where
            all that are tied stay, it is not.
        chosen: what is above are the digits that are chosen.
        shift: what is above is the next digit, too; 0 on the LAST pass.
    """
    row, start, numel = locate(rows, owners, width(BY), CHUNK)
    state += column(row, SEGMENT, BY) * STATE
    threshold = tl.load(state + THRESHOLD)
    counts = tl.zeros([VALUES], tl.int32)
    offset, size = 0, tl.minimum(numel - start, CHUNK).to(tl.int32)
    if not FIRST:
        size = tl.where(is_any_on(undecided, size), size, 0)
    while offset < size:
        first, left = start + offset, elements_left(size - offset, BY)
        kept_here, undecided_here = place_in(kept, offset), place_in(undecided, offset)
        if FIRST:
            byte = taking_part(row, kept_here, first, left, BY)
        else:
            byte = load_bytes(undecided_here, bytes_left(left))
        key, on = keys_of_block(row, byte, first, left, BY)
        differs = (key ^ threshold.to(key.dtype)) >> chosen.to(key.dtype) != 0
        above = bytes_of(on & differs & (key > threshold.to(key.dtype)))
        equal = bytes_of(on & ~differs)
        store_bytes(undecided_here, equal, bytes_left(left) if FIRST else byte != 0)
        digit = key >> shift.to(key.dtype) & (VALUES - 1)
        counts += histogram(digit, on & ~differs, VALUES)
        lost = byte & ~(above | equal)
        enter(row, kept_here, first, left, byte, above, lost, BY, FIRST, INTO_KEPT, ZEROED)
        offset += BLOCK
    place = column(row, PLACE, BY) + start // CHUNK
    if LAST:
        digits = tl.arange(0, VALUES)
        tl.store(tied + place * VALUES + digits, counts)
    if is_last_to_add(counts, state, column(row, CHUNKS, BY)):
        totals, number = totals_of_rows(state, VALUES), tl.load(state + WANTED)
        digit, number, among = choose(totals, number, threshold, shift, state, VALUES)
        if LAST and number < among:
            begin, chunks = column(row, START, BY), column(row, CHUNKS, BY)
            add_up(tied + begin * VALUES + digit, tied_before + begin, chunks, VALUES)


@jit
def _settle_kernel(
    rows,
    owners,
    kept,
    undecided,
    state,
    tied_before,
    BY: tl.constexpr,
    INTO_KEPT: tl.constexpr,
    ZEROED: tl.constexpr,
):
    """Decide the rest by the last digit; what is tied at the threshold stays as long as some are wanted."""
    row, start, numel = locate(rows, owners, width(BY), CHUNK)
    state += column(row, SEGMENT, BY) * STATE
    threshold, wanted = tl.load(state + THRESHOLD), tl.load(state + WANTED)
    some_go = wanted < tl.load(state + TIED)
    before = tied_before + column(row, PLACE, BY) + start // CHUNK
    wanted -= tl.load(before, mask=some_go, other=0)
    offset, size = 0, tl.minimum(numel - start, CHUNK).to(tl.int32)
    size = tl.where(is_any_on(undecided, size), size, 0)
    while offset < size:
        first, left = start + offset, elements_left(size - offset, BY)
        byte = load_bytes(place_in(undecided, offset), bytes_left(left))
        key, on = keys_of_block(row, byte, first, left, BY)
        stays = on & (key == threshold.to(key.dtype))
        if some_go:
            count = number_of(stays)
            stays &= ranks(stays) < wanted
            wanted -= count
        above = bytes_of(stays | on & (key > threshold.to(key.dtype)))
        kept_here = place_in(kept, offset)
        enter(row, kept_here, first, left, byte, above, byte & ~above, BY, False, INTO_KEPT, ZEROED)
        offset += BLOCK


@jit
def column(row, COLUMN: tl.constexpr, BY: tl.constexpr):
    """One of the integers behind the lists."""
    return tl.load(row + ADDRESSES + BY.lists + COLUMN)


@jit
def place_in(bits, offset):
    """The byte of an element of the program's chunk, in bits that have a place for every chunk."""
    return bits + tl.program_id(0).to(tl.int64) * (CHUNK // GROUP) + offset // GROUP


@jit
def is_any_on(bits, size):
    """Whether a bit of the program's chunk is set, which has so many elements."""
    byte = tl.arange(0, CHUNK // GROUP)
    bytes_here = tl.load(place_in(bits, 0) + byte, mask=byte < packed_bytes(size), other=0)
    return tl.max(bytes_here.to(tl.int32), axis=0) != 0


# --- counting and choosing ------------------------------------------------------------------------


@jit
def histogram(digit, on, VALUES: tl.constexpr):
    """How many of a block's elements that are on have each digit, int32 (VALUES,).

    Digit and bit are put in a row as one number. Each by itself came in an order of its own: Triton
    lets the source of a histogram be reordered, and forgets that its mask is not (3.6 to 3.8, seen on an
    H100; the interpreter reorders nothing).
    """
    row = tl.ravel(tl.where(on, digit.to(tl.int32), -1), can_reorder=True)
    return tl.histogram(row, VALUES, mask=row >= 0)


@jit
def is_last_to_add(counts, state, programs):
    """Add to the segment's histogram; whether the program is the last of its segment's to do so.

    Whoever is sees what the others have written until then. The barrier puts the writes of all threads
    in front of the one that counts the program in, which releases them; the counter passes them on from
    program to program, and acquires them for the last one, whose threads get its value behind a barrier.
    Nobody waits for another program.
    """
    bins = state + HISTOGRAM + tl.arange(0, counts.shape[0])
    tl.atomic_add(bins, counts.to(tl.int64), mask=counts != 0, sem="relaxed")
    tl.debug_barrier()
    return tl.atomic_add(state + ARRIVED, 1, sem="acq_rel", scope="gpu") == programs - 1


@jit
def totals_of_rows(state, VALUES: tl.constexpr):
    """How many have a digit that begins a row of ROW, or one of those behind it; past caches that are
    the processor's own. Where few values are possible the bins behind them are zeros.
    """
    row = tl.arange(0, rows_seen(VALUES))[:, None] * ROW
    bins = state + HISTOGRAM + row + tl.arange(0, ROW)[None, :]
    return tl.sum(tl.load(bins, cache_modifier=".cg"), axis=1)


@constexpr_function
def rows_seen(values):
    """Rows of the histogram that are looked at."""
    return max(values // ROW.value, ROW.value)


@jit
def choose(totals, wanted, threshold, shift, state, VALUES: tl.constexpr):
    """The digit at which the count from above reaches what is wanted, and the next columns of the state.

    Where nothing is wanted it is the largest, for no key has all bits set; where more are wanted than
    there are it is 0, the smallest. The histogram and the counter are zeros again.
    """
    row, above, _ = reached(totals, 0, wanted)
    bins = state + HISTOGRAM + row * ROW + tl.arange(0, ROW)
    digit, above, tied = reached(tl.load(bins, cache_modifier=".cg"), above, wanted)
    digit = tl.where(wanted > 0, row * ROW + digit, VALUES - 1)
    wanted -= above
    tl.store(state + THRESHOLD, threshold | digit << shift)
    tl.store(state + WANTED, wanted)
    tl.store(state + TIED, tied)
    tl.debug_barrier()  # other threads have read the bins that one clears
    tl.store(state + ARRIVED, tl.zeros([], tl.int64))
    tl.store(state + HISTOGRAM + tl.arange(0, VALUES), tl.zeros([VALUES], tl.int64))
    return digit, wanted, tied


@jit
def reached(count, above, wanted):
    """Where the count, from the last and with what is above it, reaches what is wanted.

    The index, what is above that, and the count there; zeros, if it does nowhere.
    """
    above += tl.sum(count) - tl.cumsum(count)
    here = (above < wanted) & (wanted <= above + count)
    index = tl.arange(0, count.shape[0]).to(tl.int64)
    return (
        tl.sum(tl.where(here, index, 0)),
        tl.sum(tl.where(here, above, 0)),
        tl.sum(tl.where(here, count, 0)),
    )


@jit
def ceil_of_product(fraction, count):
    """ceil(p * count), the product one IEEE double; p outside [0, 1] counts as the nearer end, NaN as 0."""
    p = tl.where(fraction > 0, tl.minimum(fraction, 1.0), 0.0)
    return tl.ceil(p * count.to(tl.float64)).to(tl.int64)


@jit
def add_up(tied, tied_before, chunks, VALUES: tl.constexpr):
    """tied_before[i] = tied[0] + … + tied[i - 1], the histograms' chosen column for each chunk."""
    total = tl.zeros([], tl.int64)
    first = 0
    while first < chunks:
        i = first + tl.arange(0, TOGETHER).to(tl.int64)
        count = tl.load(tied + i * VALUES, mask=i < chunks, other=0, cache_modifier=".cg")
        count = count.to(tl.int64)
        tl.store(tied_before + i, total + tl.cumsum(count) - count, mask=i < chunks)
        total += tl.sum(count)
        first += TOGETHER


# --- writing what is decided ----------------------------------------------------------------------


@jit
def enter(
    row,
    kept,
    first,
    left,
    undecided,
    above,
    lost,
    BY: tl.constexpr,
    FIRST: tl.constexpr,
    INTO_KEPT: tl.constexpr,
    ZEROED: tl.constexpr,
):
    """Set the bits of those above in ``kept`` or in the masks, clear those of the lost; the others' stay.

    So the mask of an undecided element still tells whether it was active before. Then +0.0 in the lists
    ZEROED, (list, integer of its width) each, where a bit of the masks changes.
    """
    into = mask_of_block(row, first, BY)
    if INTO_KEPT:
        into = kept
    touched = undecided != 0
    if FIRST:
        touched = bytes_left(left)
    if FIRST and (INTO_KEPT or BY.among == "all"):  # memory that nobody has written
        old = tl.zeros_like(undecided)
    elif FIRST and BY.among == "active":  # the very bytes; they must not be read once more
        old = undecided
    else:
        old = load_bytes(into, touched)
    new = old & ~lost | above
    store_bytes(into, new, touched)
    for i in tl.static_range(len(ZEROED)):
        values = address(row, ZEROED[i][0], ZEROED[i][1], BY.aligned) + first
        zero_where(old ^ new, values, left)


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
def zero_where(changed, pointer, left):
    """+0.0 where the bit is set; a group in which that changes nothing is not written."""
    byte = repeated(changed)
    element, inside = block(left)
    old = tl.load(pointer + element, mask=(byte != 0) & inside, other=0)
    new = tl.where(is_active(byte), 0, old)
    changes = repeated(tl.max((old != new).to(tl.int32), axis=1))
    tl.store(pointer + element, new, mask=(changes != 0) & inside)
