"""Layers for inference whose weight is stored as its non-zeros: sparse, or dense where that is faster.

What is derived from mask and values (the index, the values in its order, or a dense weight) is kept
as long as both tensors live and are not written to. The caller has checked the arguments.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from granet_kernels.backends.cpp.conv import conv_shape, evenly_spaced, output_size
from granet_kernels.backends.cpp.cost import chooses_sparse
from granet_kernels.backends.cpp.index import (
    MOST_SHAPES,
    Access,
    ActiveWeights,
    Index,
    Shape,
    reads_in_place,
)
from granet_kernels.backends.cpp.linear import as_rows, linear_shape
from granet_kernels.backends.cpp.mask import unpack_mask
from granet_kernels.layout import conv_memory_format
from granet_kernels.weak_map import WeakTensorMap


class StoredWeight:
    """The non-zeros of one layer, in the forms in which they are used."""

    def __init__(self, values: Tensor, mask: Tensor) -> None:
        self._versions = version(values), version(mask)
        self._values = weakref.ref(values)
        self._active = ActiveWeights(mask)
        self._ordered: dict[tuple[Shape, Access], tuple[Index, Tensor]] = {}
        self._dense: dict[torch.dtype, Tensor] = {}

    def is_of(self, values: Tensor, mask: Tensor) -> bool:
        """Whether it was derived from these tensors as they are now."""
        versions = version(values), version(mask)
        return versions == self._versions and self._values() is values

    def ordered(self, values: Tensor, shape: Shape, access: Access) -> tuple[Index, Tensor]:
        """An index for a shape, and the values in its order, float32."""
        key = (shape, access)
        if key not in self._ordered:
            index = self._active.index(shape, access, "forward")
            self._ordered[key] = (index, index.order(values))
            if len(self._ordered) > MOST_SHAPES:
                self._ordered.pop(next(iter(self._ordered)), None)
        return self._ordered[key]

    def new_output(
        self, size: Sequence[int], dtype: torch.dtype, memory_format: torch.memory_format
    ) -> Tensor:
        """For a layer's output: its elements are arbitrary."""
        output = self._active.memory.empty(size, dtype, memory_format)
        return (
            torch.empty(size, dtype=dtype, memory_format=memory_format)
            if output is None
            else output
        )

    def dense(
        self, values: Tensor, mask: Tensor, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """The whole weight."""
        if dtype not in self._dense:
            active = unpack_mask(mask, torch.Size(shape).numel()).view(torch.Size(shape))
            weight = values.new_zeros(torch.Size(shape)).masked_scatter(active, values)
            self._dense[dtype] = weight.to(dtype)
        return self._dense[dtype]


_stored: WeakTensorMap[StoredWeight] = WeakTensorMap()  # by mask


def stored_weight(values: Tensor, mask: Tensor) -> StoredWeight:
    """What has been derived from non-zeros and their mask."""
    known = _stored.get(mask)
    if known is None or not known.is_of(values, mask):
        known = StoredWeight(values, mask)
        _stored[mask] = known
    return known


def version(tensor: Tensor) -> int:
    """How often a tensor has been written to, as far as torch counts."""
    return 0 if tensor.is_inference() else tensor._version


def compressed_conv2d(
    input: Tensor,
    values: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
    *,
    algorithm: str = "auto",
) -> Tensor:
    """conv2d(input, weight) + bias + residual, then ReLU; rounded once, to the dtype of the input."""
    stored = stored_weight(values, mask)
    shape = conv_shape(input, weight_shape, stride, padding, dilation, groups)
    memory_format = conv_memory_format(input, input)
    if not chooses_sparse(shape, input, values, mask, values.numel(), algorithm):
        dtype = torch.promote_types(input.dtype, torch.float32)
        weight = stored.dense(values, mask, weight_shape, dtype)
        bias = None if bias is None else bias.to(dtype)
        output = F.conv2d(input.to(dtype), weight, bias, stride, padding, dilation, groups)
        if residual is not None:
            output += residual
        return finished(output, relu, input.dtype).contiguous(memory_format=memory_format)
    output = stored.new_output(output_size(shape), input.dtype, memory_format)
    if residual is not None and residual.stride() != output.stride():
        residual = torch.empty_like(output).copy_(residual)
    input = evenly_spaced(input)
    in_place = reads_in_place(shape, values.numel(), "forward", input, output)
    access = Access(channels_last=False, in_place=in_place)
    run_sparse(
        output, input, stored.ordered(values, shape, access), bias, residual, relu, shape, access
    )
    return output


def compressed_linear(
    input: Tensor,
    values: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    weight_shape: Sequence[int],
    relu: bool,
    *,
    algorithm: str = "auto",
) -> Tensor:
    """input @ weight.T + bias, then ReLU; rounded once, to the dtype of the input."""
    stored = stored_weight(values, mask)
    shape = linear_shape(input, weight_shape)
    if not chooses_sparse(shape, input, values, mask, values.numel(), algorithm):
        dtype = torch.promote_types(input.dtype, torch.float32)
        weight = stored.dense(values, mask, weight_shape, dtype)
        output = F.linear(input.to(dtype), weight, None if bias is None else bias.to(dtype))
        return finished(output, relu, input.dtype)
    output_shape = (*input.shape[:-1], weight_shape[0])
    output = stored.new_output(output_shape, input.dtype, torch.contiguous_format)
    access = Access(channels_last=False, in_place=False)
    rows = output.view(-1, weight_shape[0])
    ordered = stored.ordered(values, shape, access)
    run_sparse(rows, as_rows(input), ordered, bias, None, relu, shape, access)
    return output


def run_sparse(
    output: Tensor,
    input: Tensor,
    ordered: tuple[Index, Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    shape: Shape,
    access: Access,
) -> None:
    """Write the output; bias and values are not rounded to the input's dtype."""
    index, values = ordered
    bias = None if bias is None else bias.float().contiguous()
    torch.ops.granet_cpp.sparse_conv_.default(
        output, input, values, index, bias, residual, relu, list(shape), access.in_place
    )


def finished(output: Tensor, relu: bool, dtype: torch.dtype) -> Tensor:
    """What follows the sum."""
    return (output.relu_() if relu else output).to(dtype)
