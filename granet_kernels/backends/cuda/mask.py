"""Operators on masks, computed by ``csrc/cuda/{mask,cast}.cu``; the caller has checked the arguments."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

DIMENSIONS = 8  # of a gradient in another order than its weight's, that are read without a copy


def pack_mask(mask: Tensor) -> Tensor:
    """Bit ``i & 7`` of byte ``i >> 3`` = ``mask[i]``: bool 1-D to uint8 1-D, 16-byte padded."""
    return cast(Tensor, torch.ops.granet_cuda.pack_mask.default(mask))


def unpack_mask(packed: Tensor, numel: int) -> Tensor:
    """The first ``numel`` bits as bool ``(numel,)``: the inverse of :func:`pack_mask`."""
    return cast(Tensor, torch.ops.granet_cuda.unpack_mask.default(packed, numel))


def count_active(masks: list[Tensor]) -> Tensor:
    """The number of ones in each packed mask, int64 ``(len(masks),)``; one launch for all."""
    return cast(Tensor, torch.ops.granet_cuda.count_active.default(masks))


def zero_inactive_(tensors: list[Tensor], masks: list[Tensor]) -> None:
    """+0.0 where the bit is 0; one launch for all tensors whose elements have one size."""
    if tensors:
        torch.ops.granet_cuda.zero_inactive_.default(tensors, masks)


def mask_cast(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of the weight in ``dtype`` and in its layout, +0.0 where the bit is 0."""
    masked = torch.empty_like(weight, dtype=dtype)
    torch.ops.granet_cuda.mask_cast_out.default(weight, mask, None, masked)
    return masked


def mask_grad(grad: Tensor, weight: Tensor, mask: Tensor, dense_grad: Tensor) -> Tensor:
    """The gradient in the weight's dtype and layout; +0.0 where the bit is 0, unless ``dense_grad``.

    The flag is read on the device, and a gradient of any strides where it lies.
    """
    masked = torch.empty_like(weight)
    if grad.dim() > DIMENSIONS:
        in_order = torch.empty_like(weight, dtype=grad.dtype)
        grad = in_order.copy_(grad)
    torch.ops.granet_cuda.mask_cast_out.default(grad, mask, dense_grad, masked)
    return masked
