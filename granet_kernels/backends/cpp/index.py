"""The indexes of active weights that the sparse kernels read, kept from one step to the next.

An index holds which weights are active and where in the packed input each of them looks; the values
are read from the weight at every call. It belongs to a mask and to the shapes of a layer, and is
built again when the mask has changed, which the bits themselves decide: whoever wrote to them, by
whatever way, a stale index is never used. Comparing the bits costs a thousandth of what they save.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

MOST_SHAPES = 4
"""Indexes that a mask keeps for each direction: training and evaluation, with their last batches."""


class Shape(NamedTuple):
    """A convolution in numbers, in the order in which ``granet_cpp`` takes them."""

    batch: int
    channels: int
    height: int
    width: int
    out_channels: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int
    groups: int

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        return (
            (self.height + 2 * self.padding_h - self.dilation_h * (self.kernel_h - 1) - 1)
            // self.stride_h
            + 1,
            (self.width + 2 * self.padding_w - self.dilation_w * (self.kernel_w - 1) - 1)
            // self.stride_w
            + 1,
        )


Direction = Literal["forward", "input_gradient"]


class Access(NamedTuple):
    """How the kernels reach tensors that an index is for."""

    channels_last: bool
    """The storage order of the weight, and so of the mask."""
    in_place: bool
    """The source is read where it is, not packed first (see :func:`readable_in_place`)."""
    ranked: bool = False
    """Values come from a list of the active weights, not from the whole weight."""


LONGEST_TILE = 128  # pixels that a kernel sums at once


def readable_in_place(shape: Shape, *tensors: Tensor) -> bool:
    """Whether the kernels may read and write planes of these tensors where they are.

    A pointwise convolution adds up whole planes; contiguous ones need no packing, and on ResNet's
    1x1 layers packing took half of the time at 90 % sparsity.
    """
    geometry = shape[shape._fields.index("kernel_h") : shape._fields.index("groups")]
    return (
        geometry == (1, 1, 1, 1, 0, 0, 1, 1)
        and shape.height * shape.width >= LONGEST_TILE
        and all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors)
    )


Key = tuple[Shape, Access, Direction]


class MaskIndexes:
    """What is known of one mask."""

    def __init__(self, mask: Tensor) -> None:
        self.bits = mask.clone()
        self.active = int(torch.ops.granet_cpp.count_active.default([mask]))
        self.indexes: OrderedDict[Key, list[Tensor]] = OrderedDict()


_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def indexes_of(mask: Tensor) -> MaskIndexes:
    """What is known of the bits that a packed mask holds now."""
    known: MaskIndexes | None = _known.get(mask)
    if known is None or not torch.equal(known.bits, mask):
        known = MaskIndexes(mask)
        _known[mask] = known
    return known


def index_of(mask: Tensor, shape: Shape, access: Access, direction: Direction) -> list[Tensor]:
    """The index of a packed mask for a shape."""
    known = indexes_of(mask)
    key = (shape, access, direction)
    index = known.indexes.get(key)
    if index is None:
        backward = direction == "input_gradient"
        index = torch.ops.granet_cpp.stencil_index.default(
            mask, list(shape), access.channels_last, backward, access.ranked, access.in_place
        )
        known.indexes[key] = index
        if len(known.indexes) > 2 * MOST_SHAPES:
            known.indexes.popitem(last=False)
    else:
        known.indexes.move_to_end(key)
    return index
