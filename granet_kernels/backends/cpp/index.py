"""The indexes of active weights that the sparse kernels read, kept from one step to the next.

An index holds which weights are active and where in the packed input each of them looks; the values
are read from the weight at every call. It belongs to a mask and to the shapes of a layer, and is
built again when the mask has changed, which the bits themselves decide: whoever wrote to them, by
whatever way, a stale index is never used. Comparing them reads a bit for every weight at each call,
and the compiled operators do it: what they are called with is found once for each *signature* of a
call, because between two large tensors every line of Python waits for memory.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from granet_kernels.backends.cpp.memory import TensorMemory, shared_memory
from granet_kernels.choices import choice_of
from granet_kernels.weak_map import WeakTensorMap

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
    def weights(self) -> int:
        """Their number, active or not."""
        filter_size = self.channels // max(self.groups, 1) * self.kernel_h * self.kernel_w
        return self.out_channels * filter_size

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
    """The source is read where it is, not packed first (see :func:`reads_in_place`)."""


LARGEST_OFFSET = 2**31 - 1  # floats from the first plane, in an index


def reads_in_place(shape: Shape, active: int, direction: Direction, *tensors: Tensor) -> bool:
    """Whether the kernels read and write planes of these tensors, input and output, where they are.

    Packing took half of the time of ResNet's 1x1 layers at 90 % sparsity, and a third of a 3x3 layer's
    at 98 % and 56 x 56.
    """
    return all(
        tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors
    ) and bool(
        torch.ops.granet_cpp.reads_in_place.default(
            list(shape), active, direction == "input_gradient"
        )
    )


Key = tuple[Shape, Access, Direction]


class Index(NamedTuple):
    """Active weights in the order in which the kernels read them."""

    begin: Tensor
    """int64: where the entries of each (block of source channels, row) begin."""
    offset: Tensor
    """int32: where in the source an entry looks, packed or in place."""
    rank: Tensor
    """int32: which of the active weights it is, in storage order; empty where ``first`` is not."""
    first: Tensor
    """int64: the rank of the first entry of each (block, row), where the others follow it in storage
    order too; empty where they do not."""

    def order(self, values: Tensor) -> Tensor:
        """float32: values of the active weights, in the order in which the kernels want them."""
        return values.float().contiguous() if self.first.numel() else gather(values, self.rank)


def gather(
    source: Tensor, at: Tensor, *, to_bfloat16: bool = False, rising: bool = False
) -> Tensor:
    """``source[at]`` in float32, of tensors in storage order; rounded to bfloat16 first if asked.

    ``rising`` positions in a source that is in no cache are fetched ahead.
    """
    gathered: Tensor = torch.ops.granet_cpp.gather.default(source, at, to_bfloat16, rising)
    return gathered


Signature = tuple[object, ...]
"""What the checks of an operator, and the choice of how it is computed, rest on but for the mask: all that
its tensors are but their elements, and its numbers."""


class Call(NamedTuple):
    """What a compiled operator takes besides the layer's tensors."""

    known: list[Tensor]
    """The bits, and where they are set."""
    entries: list[Tensor]
    """An :class:`Index`."""
    shape: list[int]
    in_place: bool
    fetched: Fetched
    """Shared by all calls of a mask."""
    memory: TensorMemory
    """Shared by all layers."""


class Fetched:
    """The values that the forward pass fetched from a weight, for the backward pass.

    Fetching them again took a fifth of a linear layer's time on 32 rows: it reads most of the weight's
    cache lines. Backward uses them as long as the weight is the same version of the same memory. What
    is written past the version counter (``weight.data``) between the two is not seen then, and need
    not be: the gradients are those of the output that was computed.
    """

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last: tuple[object, Tensor] | None = (
            None  # replaced as a whole: threads may share a layer
        )

    def keep(self, weight: Tensor, dtype: torch.dtype, values: Tensor) -> None:
        """Remember the active weights in storage order, float32, as ``dtype`` rounds them."""
        self._last = None if weight.is_inference() else (_version(weight, dtype), values)

    def values(self, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """What was kept of this weight, if it still is so."""
        last = self._last
        if last is None or weight.is_inference() or last[0] != _version(weight, dtype):
            return None
        return last[1]


def _version(weight: Tensor, dtype: torch.dtype) -> object:
    return weight.data_ptr(), weight._version, dtype


def described(tensor: Tensor | None) -> Signature | None:
    """A tensor's part of a signature."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.is_cpu


class ActiveWeights:
    """The bits of a mask at one time, and the indexes that were built from them."""

    def __init__(self, mask: Tensor) -> None:
        self._bits = mask.clone()
        self._indexes: OrderedDict[Key, Index] = OrderedDict()
        self._positions: Tensor | None = None
        self.calls: OrderedDict[Signature, Any] = OrderedDict()
        self._fetched = Fetched()
        self.memory = shared_memory()
        self.choice = choice_of(mask)
        self.count = int(torch.ops.granet_cpp.count_active.default([mask]))

    def are_those_of(self, mask: Tensor) -> bool:
        """Whether a mask still holds these bits."""
        if mask.storage_offset() % 8 == 0:  # a word at a time takes a fifth
            return torch.equal(self._bits.view(torch.int64), mask.view(torch.int64))
        return torch.equal(self._bits, mask)

    def positions(self, weights: int) -> Tensor:
        """int32: where the active ones of ``weights`` are, in storage order."""
        if self._positions is None:
            self._positions = torch.ops.granet_cpp.active_positions.default(self._bits, weights)
        return self._positions

    def call(self, shape: Shape, access: Access, direction: Direction) -> Call:
        """How a compiled operator is called for a shape."""
        index = self.index(shape, access, direction)
        known = [self._bits, self.positions(shape.weights)]
        return Call(known, list(index), list(shape), access.in_place, self._fetched, self.memory)

    def keep(self, signature: Signature, calls: Any) -> None:
        """Remember how a sparse layer is computed."""
        self.calls[signature] = calls
        if len(self.calls) > 2 * MOST_SHAPES:
            self.calls.popitem(last=False)

    def index(self, shape: Shape, access: Access, direction: Direction) -> Index:
        """The index for a shape."""
        key = (shape, access, direction)
        index: Index | None = self._indexes.get(key)
        if index is not None:
            self._indexes.move_to_end(key)
            return index
        backward = direction == "input_gradient"
        index = Index._make(
            torch.ops.granet_cpp.stencil_index.default(
                self._bits,
                list(shape),
                access.channels_last,
                backward,
                access.in_place,
            )
        )
        self._indexes[key] = index
        if len(self._indexes) > 2 * MOST_SHAPES:
            self._indexes.popitem(last=False)
        return index


_known: WeakTensorMap[ActiveWeights] = WeakTensorMap()  # by packed mask


def active_weights(mask: Tensor) -> ActiveWeights:
    """Those that a packed mask names now."""
    known = _known.get(mask)
    if known is None or not known.are_those_of(mask):
        known = ActiveWeights(mask)
        _known[mask] = known
    return known


def kept_calls(mask: Tensor, signature: Signature) -> Any:
    """What :meth:`ActiveWeights.keep` was given, or None; the operators tell if the bits still are those."""
    known = _known.get(mask)
    if known is None or (calls := known.calls.get(signature)) is None:
        return None
    known.choice.last = "sparse"
    return calls
