"""What is ranked, as unsigned integers in the order of the ranking.

A key that is larger ranks before; equal keys rank by position. The integers have as few bits as the
order needs, 31 for the magnitude of an fp32 number, because they are looked at digit by digit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from triton import constexpr_function, jit

from granet_kernels.backends.triton.groups import elements, is_active, repeated
from granet_kernels.backends.triton.launch import GROUP
from granet_kernels.backends.triton.table import ADDRESSES, address

CHUNK = tl.constexpr(16384)
"""Elements of a program: some blocks for each histogram, some hundred programs for a common network."""

BLOCK = tl.constexpr(4096)
"""Elements that a program holds at once."""

DIGIT_BITS = 12 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else 8
"""Of a digit. The first has the 8 bits of an fp32 exponent, of which weights use few, and 4 to spread them.

Before Triton 3.8 the time of a histogram grows with its bins, and 4096 of them do not fit into registers."""

MASKS = tl.constexpr(1)
"""The list of the masks in a table."""

Order = Literal["magnitude", "growth", "number"]
Among = Literal["active", "inactive", "all"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """What is ranked, how, and among which elements: what kernels are compiled for."""

    order: Order
    """magnitude: \\|x\\|, NaN first. growth: \\|x\\|, NaN last. number: x, NaN last."""
    among: Among
    """Those that are set in their mask, those that are not kept, or all."""
    numbers: int
    """The list of the table that is ranked."""
    dtype: tl.dtype
    """Its dtype."""
    compared_in: tl.dtype
    """That of the keys, the same for all tensors that are ranked together; it holds every number exactly."""
    lists: int
    """How many lists the table has."""
    aligned: bool
    """Whether all tensors begin at multiples of 16 bytes."""
    whole: bool
    """Whether all have a multiple of eight elements."""


# Columns behind the lists of a row.
SEGMENT = tl.constexpr(0)  # what the tensor is ranked together with, as a row of the state
PLACE = tl.constexpr(1)  # the number of its first chunk among those of all tensors
START = tl.constexpr(2)  # the number of its segment's first chunk
CHUNKS = tl.constexpr(3)  # how many chunks the segment has
COLUMNS = tl.constexpr(4)


@constexpr_function
def width(by):
    """Integers in a row of the table."""
    return ADDRESSES.value + by.lists + COLUMNS.value


def key_bits(order: Order, dtype: torch.dtype) -> int:
    """How many bits a key has: a magnitude does not need the sign's."""
    return 8 * dtype.itemsize - (order != "number")


def digits(bits: int) -> list[tuple[int, int]]:
    """The digits of a key from the top: how far each is shifted, and how many values it has.

    >>> digits(31)
    [(19, 4096), (7, 4096), (0, 128)]
    """
    found = []
    while bits > 0:
        low = max(bits - DIGIT_BITS, 0)
        found.append((low, 1 << (bits - low)))
        bits = low
    return found


@jit
def key_of(number, BY: tl.constexpr):
    """The key of a floating-point number: uint32, or uint64 where fp64 is ranked.

    The bits below the sign have the order of magnitudes, and NaN lies above infinity. Of numbers, -0.0
    and +0.0 share a key, and so do all NaN of each ranking.
    """
    FLOAT: tl.constexpr = BY.compared_in
    WIDTH: tl.constexpr = FLOAT.primitive_bitwidth
    KEY: tl.constexpr = tl.uint64 if WIDTH == 64 else tl.uint32
    SIGN: tl.constexpr = 1 << (WIDTH - 1)
    INFINITY: tl.constexpr = SIGN - (1 << FLOAT.fp_mantissa_width)
    pattern = pattern_of(widened(number, FLOAT)).to(KEY)
    magnitude = pattern & (SIGN - 1)
    if BY.order == "magnitude":
        key = tl.minimum(magnitude, INFINITY + 1)
    elif BY.order == "growth":
        key = tl.where(magnitude > INFINITY, 0, magnitude + 1)
    else:
        signed = tl.where(pattern < SIGN, SIGN + magnitude, SIGN - magnitude)
        key = tl.where(magnitude > INFINITY, 0, signed)
    return key


@jit
def widened(number, FLOAT: tl.constexpr):
    """The same number in a dtype that holds it; bf16 is the upper half of fp32, subnormals included."""
    if number.dtype == tl.bfloat16 and FLOAT.primitive_bitwidth > 16:
        number = (pattern_of(number).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return number.to(FLOAT)


@jit
def pattern_of(number):
    """The bits of a floating-point number as an unsigned integer."""
    WIDTH: tl.constexpr = number.dtype.primitive_bitwidth
    return number.to(tl.core.get_int_dtype(WIDTH, signed=False), bitcast=True)


@jit
def keys_of_block(row, byte, first, left, BY: tl.constexpr):
    """Keys, [BLOCK / 8, 8], and of which elements they are.

    Args:
        row: of the tensor in the table.
        byte: bits of the elements that are asked for; a group without any is not read.
        first: the element of the tensor at which the block begins.
        left: how many of its elements the tensor has.
        BY: the ranking.
    """
    byte = repeated(byte)
    element, inside = block(left)
    numbers = address(row, BY.numbers, BY.dtype, BY.aligned) + first
    number = tl.load(numbers + element, mask=(byte != 0) & inside, other=0)
    return key_of(number, BY), is_active(byte) & inside


@jit
def taking_part(row, kept, first, left, BY: tl.constexpr):
    """The bytes of those that are ranked; ``kept`` is the block's place in the mask of what stays anyway."""
    if BY.among == "active":
        byte = load_bytes(mask_of_block(row, first, BY), bytes_left(left))
    elif BY.among == "inactive":
        byte = load_bytes(kept, bytes_left(left)) ^ 0xFF
    else:
        byte = tl.full([BLOCK // GROUP], 0xFF, tl.int32)
    return byte


@jit
def mask_of_block(row, first, BY: tl.constexpr):
    """The byte of the mask with which the block begins."""
    return address(row, MASKS, tl.uint8, BY.aligned) + first // GROUP


@jit
def elements_left(of_chunk, BY: tl.constexpr):
    """How many elements of the block are the tensor's, of so many that its chunk has left."""
    left = tl.minimum(of_chunk, BLOCK)
    if BY.whole:
        left = tl.multiple_of(left, GROUP)
    return left


@jit
def block(left):
    """The elements of a block, (BLOCK / 8, 8), and which of them are the tensor's."""
    element = elements(tl.arange(0, BLOCK // GROUP))
    return element, element < left


@jit
def load_bytes(mask, wanted):
    """Those bytes of a block that are wanted, as int32, (BLOCK / 8,); 0 for the others."""
    return tl.load(mask + tl.arange(0, BLOCK // GROUP), mask=wanted, other=0).to(tl.int32)


@jit
def store_bytes(mask, byte, wanted):
    """The inverse of :func:`load_bytes`."""
    tl.store(mask + tl.arange(0, BLOCK // GROUP), byte.to(tl.uint8), mask=wanted)


@jit
def bytes_left(left):
    """Which bytes of a block the mask has."""
    return tl.arange(0, BLOCK // GROUP) < packed_bytes(left)


@jit
def packed_bytes(left):
    """Bytes of the mask of so many elements: granet_kernels.layout.packed_length."""
    return (left + 127) // 128 * 16


@jit
def bytes_of(on):
    """Of bits, bool (groups, 8), the bytes, int32 (groups,)."""
    return tl.sum(on.to(tl.int32) << tl.arange(0, GROUP)[None, :], axis=1)
