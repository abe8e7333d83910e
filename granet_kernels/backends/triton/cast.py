"""The masked cast and its gradient, each in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from granet_kernels.backends.triton.accounts import group_bytes, in_groups, in_sectors
from granet_kernels.backends.triton.groups import elements, is_active, repeated
from granet_kernels.backends.triton.launch import GROUP, converted, jit, launch
from granet_kernels.layout import aligned, storage_order

GROUPS = 256  # mask bytes of a program
GATHERED = 128  # the same where each element's place is computed, which takes registers
DIMENSIONS = 4  # of a gradient in another order than its weight's, that are read without a copy


def mask_cast(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of the weight in ``dtype`` and in its layout, +0.0 where the bit is 0."""
    cast = torch.empty_like(weight, dtype=dtype)
    _launch(cast, weight, mask, dense=None)
    return cast


def mask_grad(grad: Tensor, weight: Tensor, mask: Tensor, dense_grad: Tensor) -> Tensor:
    """The gradient in the weight's dtype and layout; +0.0 where the bit is 0, unless ``dense_grad``.

    The flag is read on the device, and a gradient of any strides where it lies.
    """
    masked = torch.empty_like(weight)
    _launch(masked, grad, mask, dense=dense_grad.view(torch.uint8))
    return masked


def mask_cast_bytes(
    weight: Tensor, mask: Tensor, dtype: torch.dtype, *, dense: bool = False
) -> int:
    """Groups with an active weight, or all where the gradient is ``dense``, read; all written.

    Also of ``mask_grad``, with the gradient in the place of the weight, where both have one layout.
    """
    byte = group_bytes(weight, mask)
    read = in_groups((byte != 0) | dense, weight.element_size())
    return in_sectors(byte.numel()) + read + in_sectors(weight.numel() * dtype.itemsize)


def _launch(target: Tensor, source: Tensor, mask: Tensor, dense: Tensor | None) -> None:
    numel = target.numel()
    programs = triton.cdiv(numel, GROUPS * GROUP.value)
    whole = numel % GROUP.value == 0
    linear = [(numel, 1)]
    dims = linear if source.stride() == target.stride() else _merged_dimensions(source, target)
    if len(dims) > DIMENSIONS:
        source, dims = aligned(source, like=target).contiguous(), linear
    if dims in ([], linear):
        launch(_mask_cast_kernel, programs, target, source, mask, dense, numel, whole, GROUPS)
        return
    sizes, strides = zip(*dims, *[(1, 0)] * (DIMENSIONS - len(dims)), strict=True)
    index = tl.int32 if numel < 1 << 30 else tl.int64  # divisions of 64 bits are slow
    programs = triton.cdiv(numel, GATHERED * GROUP.value)
    where = (target, source, mask, dense, numel, *sizes[:-1], *strides)
    launch(_mask_gather_kernel, programs, *where, whole, index, GATHERED)


def _merged_dimensions(source: Tensor, like: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the source's dimensions in the order of ``like``'s memory, the fastest first.

    Neighbours that one stride runs through are one dimension.
    """
    dims: list[tuple[int, int]] = []
    for d in reversed(storage_order(like)):
        size, stride = source.size(d), source.stride(d)
        if size == 1:
            continue
        if dims and stride == dims[-1][0] * dims[-1][1]:
            dims[-1] = (size * dims[-1][0], dims[-1][1])
        else:
            dims.append((size, stride))
    return dims


@jit(do_not_specialize=("dense", "numel"))
def _mask_cast_kernel(
    target, source, mask, dense, numel, WHOLE: tl.constexpr, GROUPS: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * GROUPS
    target += first * GROUP
    source += first * GROUP
    mask += first
    left = numel - first * GROUP
    whole = tl.multiple_of(left, GROUP) if WHOLE else left // GROUP * GROUP
    _cast_groups(target, source, mask, dense, tl.arange(0, GROUPS), whole)
    if not WHOLE and whole < GROUPS * GROUP:  # an incomplete group ends the tensor
        _cast_groups(target, source, mask, dense, whole // GROUP + tl.arange(0, 1), left)


@jit
def _cast_groups(target, source, mask, dense, group, end):
    """Those elements of the groups that are in front of ``end``."""
    byte = repeated(tl.load(mask + group, mask=group * GROUP < end, other=0))
    if dense is not None:
        byte |= tl.where(tl.load(dense) != 0, 0xFF, 0).to(tl.uint8)
    element = elements(group)
    inside = element < end
    value = tl.load(source + element, mask=(byte != 0) & inside, other=0)
    value = tl.where(is_active(byte), converted(value, target.dtype.element_ty), 0.0)
    tl.store(target + element, value, mask=inside)


@jit(
    do_not_specialize=(
        "dense",
        "numel",
        "size_0",
        "size_1",
        "size_2",
        "stride_0",
        "stride_1",
        "stride_2",
        "stride_3",
    )
)
def _mask_gather_kernel(
    target,
    source,
    mask,
    dense,
    numel,
    size_0,
    size_1,
    size_2,
    stride_0,
    stride_1,
    stride_2,
    stride_3,
    WHOLE: tl.constexpr,
    INDEX: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """As _mask_cast_kernel, of a source in another order: dimension 0 is the target's fastest."""
    first = tl.program_id(0).to(INDEX) * GROUPS
    left = numel - first * GROUP
    if WHOLE:
        left = tl.multiple_of(left, GROUP)
    group = tl.arange(0, GROUPS)
    byte = repeated(tl.load(mask + first + group, mask=group * GROUP < left, other=0))
    if dense is not None:
        byte |= tl.where(tl.load(dense) != 0, 0xFF, 0).to(tl.uint8)
    element = elements(group)
    inside = element < left
    active = is_active(byte) & inside

    rest = first * GROUP + element
    offset = (rest % size_0).to(tl.int64) * stride_0
    rest = rest // size_0
    offset += (rest % size_1).to(tl.int64) * stride_1
    rest = rest // size_1
    offset += (rest % size_2).to(tl.int64) * stride_2
    offset += (rest // size_2).to(tl.int64) * stride_3

    value = converted(tl.load(source + offset, mask=active, other=0), target.dtype.element_ty)
    tl.store(target + first * GROUP + element, tl.where(active, value, 0.0), mask=inside)
