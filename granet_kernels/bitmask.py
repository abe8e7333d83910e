"""The 1-bit mask as a value, and which mask belongs to which parameter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from granet_kernels.functional import count_active, pack_mask, unpack_mask
from granet_kernels.layout import (
    full_mask,
    inverse_permutation,
    packed_length,
    storage_order,
)
from granet_kernels.weak_map import WeakTensorMap


@dataclass(frozen=True, eq=False, slots=True)
class BitMask:
    """Packed bits together with what explains them: the weight's shape and its order in memory.

    The canonical form has row-major order; it is what a checkpoint holds, so that saving does not
    depend on the memory format of the weight. Copying, pickling and meta tensors work as for the
    tensor inside.
    """

    packed: Tensor
    """uint8 (packed_length(numel),)."""
    shape: torch.Size
    """Of the weight."""
    order: tuple[int, ...]
    """Dimensions of the weight from slowest to fastest in memory."""

    @classmethod
    def full(cls, like: Tensor) -> BitMask:
        """All weights of ``like`` active."""
        return cls(full_mask(like.numel(), like.device), like.shape, storage_order(like))

    @classmethod
    def from_bool(cls, mask: Tensor, like: Tensor) -> BitMask:
        """A bool mask of the shape of ``like``, packed in its storage order."""
        return cls(pack_mask(mask, like=like), like.shape, storage_order(like))

    @classmethod
    def from_canonical(cls, packed: Tensor, shape: torch.Size) -> BitMask:
        """Packed bits in row-major order.

        Raises:
            ValueError: not the mask of that many weights, or bits set behind the last weight.
        """
        expected = (packed_length(shape.numel()),)
        if packed.dtype != torch.uint8 or tuple(packed.shape) != expected:
            got = f"{packed.dtype} {tuple(packed.shape)}"
            raise ValueError(
                f"expected the mask of {tuple(shape)} weights, uint8 {expected}, got {got}"
            )
        if packed.device.type != "meta" and bool(
            (packed & ~full_mask(shape.numel(), packed.device)).any()
        ):
            raise ValueError(
                f"expected zero bits behind the last of {shape.numel()} weights, got a set one"
            )
        return cls(packed, shape, tuple(range(len(shape))))

    def to_bool(self) -> Tensor:
        """A bool tensor of the weight's shape."""
        elements = unpack_mask(self.packed, (self.shape.numel(),))
        in_memory = elements.view([self.shape[d] for d in self.order])
        return in_memory.permute(inverse_permutation(self.order))

    def canonical(self) -> Tensor:
        """The bits in row-major order: the buffer itself where that is its order already."""
        return self.packed if self._is_row_major() else pack_mask(self.to_bool())

    def in_order_of(self, like: Tensor) -> BitMask:
        """The same mask for a weight of the same shape with another memory layout."""
        return (
            self if storage_order(like) == self.order else BitMask.from_bool(self.to_bool(), like)
        )

    def count(self) -> int:
        """Active weights. Waits for the device."""
        return int(count_active([self.packed]))

    def sparsity(self) -> float:
        """The fraction of weights that are inactive; 0 for a weight without elements."""
        numel = self.shape.numel()
        return 1.0 - self.count() / numel if numel else 0.0

    def _is_row_major(self) -> bool:
        longer_than_one = [d for d in self.order if self.shape[d] != 1]
        return longer_than_one == sorted(longer_than_one)


@dataclass(frozen=True, slots=True)
class _Attachment:
    packed: Tensor
    stride: tuple[int, ...]
    """Of the weight, when the bits were in its order."""


_attachments: WeakTensorMap[_Attachment] = WeakTensorMap()  # by weight
_attachments_made = 0


def attachments_made() -> int:
    """Grows whenever a mask is attached or detached: for those who remember what was attached."""
    return _attachments_made


def attach_mask(weight: Tensor, packed: Tensor) -> None:
    """Tell optimizers that ``packed`` is the mask of this parameter, in its storage order.

    The masked layers do this for their weights. It is public so that any other parameter can be
    masked: keep the invariant that an inactive weight is zero
    (:func:`granet_kernels.zero_inactive_`).

    Args:
        weight: dense in memory.
        packed: uint8 1-D, one bit a weight in storage order. Not checked here: the optimizer's step does.
    """
    global _attachments_made
    _attachments_made += 1
    _attachments[weight] = _Attachment(packed, weight.stride())


def detach_mask(weight: Tensor) -> None:
    """Let optimizers treat this parameter as dense again."""
    global _attachments_made
    _attachments_made += 1
    _attachments.pop(weight)


def attached_mask(weight: Tensor) -> Tensor | None:
    """The packed mask of a parameter; None if it has none.

    A weight may change its layout behind our back (``weight.data = …``, as torch's own
    ``convert_conv2d_weight_memory_format`` does): then the bits are put into its new order first.
    """
    attachment = _attachments.get(weight)
    if attachment is None:
        return None
    if weight.stride() != attachment.stride:
        as_attached = torch.empty_strided(weight.shape, attachment.stride, device="meta")
        mask = BitMask(attachment.packed, weight.shape, storage_order(as_attached))
        attachment.packed.copy_(mask.in_order_of(weight).packed)
        attach_mask(weight, attachment.packed)
    return attachment.packed
