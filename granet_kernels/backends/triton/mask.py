"""Packing, unpacking, counting and zeroing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from granet_kernels.backends.triton.accounts import FULL, group_bytes, in_groups, in_sectors
from granet_kernels.backends.triton.groups import elements, is_active, repeated
from granet_kernels.backends.triton.launch import GROUP, INTEGERS, jit, launch
from granet_kernels.backends.triton.table import ALIGNMENT, Table, address, locate
from granet_kernels.layout import packed_length

GROUPS = 256  # mask bytes of a program
COUNTED = 4096  # mask bytes that a program counts


def pack_mask(mask: Tensor) -> Tensor:
    """Bit ``i & 7`` of byte ``i >> 3`` = ``mask[i]``; the bits behind the last element are zero."""
    numel, length = mask.numel(), packed_length(mask.numel())
    packed = mask.new_empty(length, dtype=torch.uint8)
    programs = triton.cdiv(length, GROUPS)
    whole = numel % GROUP.value == 0
    launch(_pack_kernel, programs, packed, mask.view(torch.uint8), numel, length, whole, GROUPS)
    return packed


def pack_mask_bytes(numel: int) -> int:
    """A byte an element read, a bit written."""
    return in_sectors(numel) + in_sectors(packed_length(numel))


def unpack_mask(packed: Tensor, numel: int) -> Tensor:
    """Element ``i`` = bit ``i & 7`` of byte ``i >> 3``, bool ``(numel,)``."""
    mask = packed.new_empty(numel, dtype=torch.bool)
    programs = triton.cdiv(numel, GROUPS * GROUP.value)
    whole = numel % GROUP.value == 0
    launch(_unpack_kernel, programs, mask.view(torch.uint8), packed, numel, whole, GROUPS)
    return mask


def unpack_mask_bytes(numel: int) -> int:
    """A bit an element read, a byte written."""
    return in_sectors(-(-numel // GROUP.value)) + in_sectors(numel)


def count_active(masks: Sequence[Tensor]) -> Tensor:
    """How many bits of each mask are set, int64 ``(len(masks),)``; one launch for all."""
    counts = masks[0].new_zeros(len(masks), dtype=torch.int64)
    table = Table.of([masks], COUNTED)
    launch(
        _count_kernel,
        table.chunks,
        counts,
        table.rows,
        table.owners,
        WIDTH=table.width,
        WHOLE=all(mask.numel() % ALIGNMENT.value == 0 for mask in masks),
        ALIGNED=table.aligned,
        CHUNK=COUNTED,
    )
    return counts


def count_active_bytes(masks: Sequence[Tensor]) -> int:
    """The masks read."""
    return sum(in_sectors(mask.numel()) for mask in masks)


def zero_inactive_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """+0.0 where the bit is 0; one launch for all tensors whose elements have one size."""
    for size in {tensor.element_size() for tensor in tensors}:
        chosen = [
            (tensor, mask)
            for tensor, mask in zip(tensors, masks, strict=True)
            if tensor.element_size() == size
        ]
        table = Table.of(list(zip(*chosen, strict=True)), GROUPS * GROUP.value)
        launch(
            _zero_inactive_kernel,
            table.chunks,
            table.rows,
            table.owners,
            WIDTH=table.width,
            BITS=INTEGERS[size],
            WHOLE=all(tensor.numel() % GROUP.value == 0 for tensor, _ in chosen),
            ALIGNED=table.aligned,
            GROUPS=GROUPS,
        )


def zero_inactive_bytes(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> int:
    """Groups that are not wholly active written, and those of them with an active element read."""
    total = 0
    for tensor, mask in zip(tensors, masks, strict=True):
        byte, size = group_bytes(tensor, mask), tensor.element_size()
        written = byte != FULL
        total += in_sectors(byte.numel()) + in_groups(written, size)
        total += in_groups(written & (byte != 0), size)
    return total


@jit(do_not_specialize=("numel", "length"))
def _pack_kernel(packed, mask, numel, length, WHOLE: tl.constexpr, GROUPS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * GROUPS
    group = tl.arange(0, GROUPS)
    left = numel - first * GROUP
    if WHOLE:
        left = tl.multiple_of(left, GROUP)
    element = elements(group)
    on = tl.load(mask + first * GROUP + element, mask=element < left, other=0)
    byte = tl.sum((on != 0).to(tl.int32) << tl.arange(0, GROUP)[None, :], axis=1)
    tl.store(packed + first + group, byte.to(tl.uint8), mask=first + group < length)


@jit(do_not_specialize=("numel",))
def _unpack_kernel(mask, packed, numel, WHOLE: tl.constexpr, GROUPS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * GROUPS
    group = tl.arange(0, GROUPS)
    left = numel - first * GROUP
    if WHOLE:
        left = tl.multiple_of(left, GROUP)
    byte = repeated(tl.load(packed + first + group, mask=group * GROUP < left, other=0))
    element = elements(group)
    tl.store(mask + first * GROUP + element, is_active(byte).to(tl.uint8), mask=element < left)


@jit
def _count_kernel(
    counts,
    rows,
    owners,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row, start, length = locate(rows, owners, WIDTH, CHUNK)
    left = length - start
    if WHOLE:
        left = tl.multiple_of(left, ALIGNMENT)
    i = tl.arange(0, CHUNK)
    x = tl.load(address(row, 0, tl.uint8, ALIGNED) + start + i, mask=i < left, other=0).to(tl.int32)
    x -= x >> 1 & 0x55  # ones of each two bits, of each four, of the byte
    x = (x & 0x33) + (x >> 2 & 0x33)
    x = x + (x >> 4) & 0x0F
    tl.atomic_add(counts + tl.load(owners + tl.program_id(0)), tl.sum(x).to(tl.int64))


@jit
def _zero_inactive_kernel(
    rows,
    owners,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row, start, numel = locate(rows, owners, WIDTH, GROUPS * GROUP)
    tensor = address(row, 0, BITS, ALIGNED) + start
    mask = address(row, 1, tl.uint8, ALIGNED) + start // GROUP
    left = numel - start
    whole = tl.multiple_of(left, GROUP) if WHOLE else left // GROUP * GROUP
    _zero_groups(tensor, mask, tl.arange(0, GROUPS), whole)
    if not WHOLE and whole < GROUPS * GROUP:  # an incomplete group ends the tensor
        _zero_groups(tensor, mask, whole // GROUP + tl.arange(0, 1), left)


@jit
def _zero_groups(tensor, mask, group, end):
    """Those elements of the groups that are in front of ``end``."""
    byte = repeated(tl.load(mask + group, mask=group * GROUP < end, other=0))
    element = elements(group)
    changed = (byte != 0xFF) & (element < end)
    old = tl.load(tensor + element, mask=(byte != 0) & changed, other=0)
    tl.store(tensor + element, tl.where(is_active(byte), old, 0), mask=changed)
