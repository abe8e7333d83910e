"""Packing, counting, zeroing, and the masked cast with its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from granet_kernels.layout import packed_length, shaped, storage_view


def pack_mask(mask: Tensor) -> Tensor:
    """Bit ``i & 7`` of byte ``i >> 3`` is ``mask[i]``; the bits behind the last element are zero."""
    bits = mask.new_zeros(8 * packed_length(mask.numel()))
    bits[: mask.numel()] = mask
    value_of_bit = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits.view(-1, 8) * value_of_bit).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, numel: int) -> Tensor:
    """Element ``i`` is bit ``i & 7`` of byte ``i >> 3``."""
    bit = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[:, None] >> bit & 1).bool().view(-1)[:numel]


def active(mask: Tensor, like: Tensor) -> Tensor:
    """The mask of a weight as a bool tensor of the weight's shape."""
    return shaped(unpack_mask(mask, like.numel()), like)


def count_active(masks: Sequence[Tensor]) -> Tensor:
    """How many bits of each mask are set, int64 (len(masks),)."""
    return torch.stack([unpack_mask(mask, 8 * mask.numel()).sum() for mask in masks])


def zero_inactive_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """+0.0 where the bit is 0. Not ``tensor * mask``: NaN would stay, and -1 become -0.0."""
    for tensor, mask in zip(tensors, masks, strict=True):
        storage_view(tensor).masked_fill_(~unpack_mask(mask, tensor.numel()), 0.0)


def mask_cast(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of the weight in another dtype and the same layout, +0.0 where the bit is 0."""
    cast = torch.empty_like(weight, dtype=dtype).copy_(weight)
    zero_inactive_([cast], [mask])
    return cast


def mask_grad(grad: Tensor, weight: Tensor, mask: Tensor, dense_grad: Tensor) -> Tensor:
    """The gradient in the weight's dtype and layout; +0.0 where the bit is 0, unless ``dense_grad``."""
    kept = active(mask, weight) | dense_grad
    return torch.empty_like(weight).copy_(torch.where(kept, grad, 0.0))
