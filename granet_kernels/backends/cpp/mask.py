"""Operators on masks, computed by ``csrc/cpu/{mask,cast}.cpp``; the caller has checked the arguments."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from granet_kernels.layout import aligned


def pack_mask(mask: Tensor) -> Tensor:
    """Bit ``i & 7`` of byte ``i >> 3`` = ``mask[i]``: bool 1-D to uint8 1-D, 16-byte padded."""
    return cast(Tensor, torch.ops.granet_cpp.pack_mask.default(mask))


def unpack_mask(packed: Tensor, numel: int) -> Tensor:
    """The first ``numel`` bits as bool ``(numel,)``: the inverse of :func:`pack_mask`."""
    return cast(Tensor, torch.ops.granet_cpp.unpack_mask.default(packed, numel))


def count_active(masks: list[Tensor]) -> Tensor:
    """The number of ones in each packed mask, int64 ``(len(masks),)``."""
    if not masks:  # the dispatcher finds its kernel by a tensor
        return torch.empty(0, dtype=torch.int64)
    return cast(Tensor, torch.ops.granet_cpp.count_active.default(masks))


def zero_inactive_(tensors: list[Tensor], masks: list[Tensor]) -> None:
    """Element i, in storage order, = +0.0 where bit i is 0; elements of 1, 2, 4 or 8 bytes."""
    if tensors:
        torch.ops.granet_cpp.zero_inactive_.default(tensors, masks)


def mask_cast(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of the weight in ``dtype`` and in its layout, +0.0 where the bit is 0."""
    masked = torch.empty_like(weight, dtype=dtype)
    torch.ops.granet_cpp.mask_cast_out.default(weight, mask, masked)
    return masked


def mask_grad(grad: Tensor, weight: Tensor, mask: Tensor, dense_grad: Tensor) -> Tensor:
    """The gradient (any strides and floating dtype) in the weight's dtype and layout.

    It is +0.0 where the bit is 0, unless ``dense_grad`` is true.
    """
    masked = torch.empty_like(weight)
    if dense_grad:
        return masked.copy_(grad)
    if grad.stride() != weight.stride():
        grad = aligned(grad, like=weight).contiguous()  # the view of an expanded one has gaps
    torch.ops.granet_cpp.mask_cast_out.default(grad, mask, masked)
    return masked
