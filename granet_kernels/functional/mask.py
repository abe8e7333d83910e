"""Packing masks, counting in them, and zeroing what they leave out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import granet_kernels.ops  # noqa: F401 - registers the operators
from granet_kernels.functional.arguments import tensor_list
from granet_kernels.layout import aligned, shaped

_ops = torch.ops.granet


def pack_mask(mask: Tensor, *, like: Tensor | None = None) -> Tensor:
    """Pack a bool mask of any shape into bits, uint8 1-D, padded to 16 bytes.

    Args:
        mask: bool, any shape and strides.
        like: pack in the storage order of this tensor (same shape), which is what a mask needs that
            belongs to a channels_last weight. By default in row-major order.

    Raises:
        ValueError: ``mask`` is not bool, or ``like`` has another shape.
    """
    if like is not None and like.shape != mask.shape:
        raise ValueError(
            f"like: expected shape {tuple(mask.shape)} as mask, got {tuple(like.shape)}"
        )
    elements = mask.reshape(-1) if like is None else aligned(mask, like)
    return _ops.pack_mask(elements.contiguous())  # type: ignore[no-any-return]


def unpack_mask(packed: Tensor, shape: Sequence[int], *, like: Tensor | None = None) -> Tensor:
    """The inverse of :func:`pack_mask`: a bool tensor of ``shape``.

    Args:
        packed: uint8 1-D.
        shape: of the mask.
        like: the bits are in the storage order of this tensor; by default in row-major order.

    Raises:
        ValueError: ``packed`` is not the mask of that many elements, or ``like`` has another shape.
    """
    size = torch.Size(shape)
    if like is not None and like.shape != size:
        raise ValueError(
            f"like: expected shape {tuple(size)} as shape says, got {tuple(like.shape)}"
        )
    elements: Tensor = _ops.unpack_mask(packed, size.numel())
    return elements.view(size) if like is None else shaped(elements, like)


def count_active(masks: Sequence[Tensor]) -> Tensor:
    """Active weights of each packed mask: int64 (len(masks),), on the masks' device, without a wait.

    Args:
        masks: packed, uint8 1-D.

    Raises:
        TypeError: one tensor where a sequence is expected.
        ValueError: a mask is not packed, or on another device than the first.
    """
    masks = tensor_list("masks", masks)
    return _ops.count_active(masks) if masks else torch.zeros(0, dtype=torch.int64)


@torch.no_grad()
def zero_inactive_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set inactive elements to +0.0, whatever they were (NaN and infinity included).

    Args:
        tensors: dense in memory; weights, or optimizer states of a weight's layout.
        masks: one packed mask for each.

    Raises:
        TypeError: one tensor where a sequence is expected.
        ValueError: a shape, dtype, device or memory layout that does not fit. Nothing has been changed
            then.
    """
    if tensors := tensor_list("tensors", tensors):
        _ops.zero_inactive_(tensors, tensor_list("masks", masks))
