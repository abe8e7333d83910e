"""Two-dimensional convolution with a masked weight: sparse by ``csrc/cpu/conv.cpp``, or dense.

The caller has checked the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from granet_kernels.backends.cpp.cost import chooses_sparse
from granet_kernels.backends.cpp.index import (
    Access,
    ActiveWeights,
    Call,
    Direction,
    Shape,
    Signature,
    active_weights,
    described,
    kept_calls,
    reads_in_place,
)
from granet_kernels.backends.cpp.mask import mask_cast, mask_grad
from granet_kernels.backends.cpp.memory import is_large
from granet_kernels.backends.cpp.sparse import Backward, Forward, sparse_gradients, sparse_output
from granet_kernels.layout import conv_memory_format

Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], int]
"""Stride, padding, dilation and groups."""


def try_masked_conv2d(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    algorithm: str = "auto",
) -> Any:
    """:func:`masked_conv2d` where a sparse call was alike, and so was checked; else ``NotImplemented``."""
    geometry = (stride, padding, dilation, groups)
    forward = kept_calls(mask, _forward_signature(input, weight, bias, geometry, algorithm))
    if forward is None:
        return NotImplemented
    return _sparse_forward(forward, input, weight, mask, bias)


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    algorithm: str = "auto",
) -> Tensor:
    """conv2d(input, weight where active), in the dtype of the input."""
    geometry = (stride, padding, dilation, groups)
    output: Any = NotImplemented
    while output is NotImplemented:  # again, should someone write to the mask meanwhile
        forward = _prepare_forward(input, weight, mask, bias, geometry, algorithm)
        if forward is None:
            return _dense_forward(input, weight, mask, bias, geometry)
        output = _sparse_forward(forward, evenly_spaced(input), weight, mask, bias)
    return output  # type: ignore[no-any-return]


def try_masked_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    dense_grad: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needs: Sequence[bool],
    *,
    algorithm: str = "auto",
) -> Any:
    """:func:`masked_conv2d_backward` where a sparse call was alike; else ``NotImplemented``."""
    geometry = (stride, padding, dilation, groups)
    signature = _backward_signature(grad_output, input, weight, bias, geometry, algorithm)
    backward = kept_calls(mask, signature)
    if backward is None or (needs[1] and bool(dense_grad)):
        return NotImplemented
    return _sparse_backward(backward, grad_output, input, weight, mask, bias, needs)


def masked_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    dense_grad: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needs: Sequence[bool],
    *,
    algorithm: str = "auto",
) -> list[Tensor]:
    """Gradients of input, weight and bias, those that are needed; the weight's through the mask."""
    geometry = (stride, padding, dilation, groups)
    images = evenly_spaced(grad_output), evenly_spaced(input)
    dense_weight = needs[1] and bool(dense_grad)  # then its gradient alone is computed densely
    gradients: Any = NotImplemented
    while gradients is NotImplemented:  # again, should someone write to the mask meanwhile
        backward = _prepare_backward(grad_output, input, weight, mask, bias, geometry, algorithm)
        tensors = (grad_output, input, weight, mask, bias, dense_grad)
        if backward is None:
            return _dense_backward(*tensors, geometry, needs)
        sparse_needs = [needs[0], False, False] if dense_weight else needs
        gradients = _sparse_backward(backward, *images, weight, mask, bias, sparse_needs)
    if dense_weight:
        gradients += _dense_backward(*tensors, geometry, [False, *needs[1:]])
    return gradients  # type: ignore[no-any-return]


def _dense_forward(
    input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    masked = mask_cast(weight, mask, input.dtype)
    bias = None if bias is None else bias.to(input.dtype)
    output = F.conv2d(input, masked, bias, *geometry)
    return output.contiguous(memory_format=conv_memory_format(input, weight))


def _dense_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    dense_grad: Tensor,
    geometry: Geometry,
    needs: Sequence[bool],
) -> list[Tensor]:
    needs_input, needs_weight, needs_bias = needs
    gradients = []
    if needs_input or needs_weight:
        masked = mask_cast(weight, mask, input.dtype) if needs_input else weight.to(input.dtype)
        outputs = [needs_input, needs_weight, False]
        *where, groups = geometry
        grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad_output, input, masked, None, *where, False, [0, 0], groups, outputs
        )
    if needs_input:
        gradients.append(torch.empty_like(input).copy_(grad_input))
    if needs_weight:
        gradients.append(mask_grad(grad_weight, weight, mask, dense_grad))
    if needs_bias and bias is not None:
        gradients.append(torch.empty_like(bias).copy_(grad_output.sum((0, 2, 3))))
    return gradients


def _sparse_forward(
    forward: Forward, input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None
) -> Any:
    """The output; ``NotImplemented`` where the mask has other bits than when this was prepared."""
    return sparse_output(input, weight, mask, bias, forward)


def _sparse_backward(
    backward: Backward,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    needs: Sequence[bool],
) -> Any:
    """The gradients that are needed; ``NotImplemented`` as above."""
    gradients = sparse_gradients(grad_output, input, weight, mask, backward, needs[:2])
    if needs[2] and bias is not None and gradients is not NotImplemented:
        gradients.append(torch.empty_like(bias).copy_(grad_output.sum((0, 2, 3))))
    return gradients


def _forward_signature(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, algorithm: str
) -> Signature:
    stride, padding, dilation, groups = geometry
    return (
        *("forward", described(input), described(weight), described(bias)),
        *(*stride, *padding, *dilation, groups, algorithm),
    )


def _backward_signature(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    algorithm: str,
) -> Signature:
    stride, padding, dilation, groups = geometry
    return (
        *("backward", described(grad_output), described(input), described(weight), described(bias)),
        *(*stride, *padding, *dilation, groups, algorithm),
    )


def _prepare_forward(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    algorithm: str,
) -> Forward | None:
    """How a layer is computed; None: densely."""
    shape = conv_shape(input, weight.shape, *geometry)
    active = active_weights(mask)
    if not chooses_sparse(shape, input, weight, mask, active.count, algorithm):
        return None
    size, memory_format = output_size(shape), conv_memory_format(input, weight)
    output = torch.empty(size, dtype=input.dtype, memory_format=memory_format)
    source = evenly_spaced(input)
    call = call_of(active, shape, "forward", weight, source, output)
    forward = Forward(call, memory_format, size if is_large(size, input.dtype) else None)
    if source is input:
        active.keep(_forward_signature(input, weight, bias, geometry, algorithm), forward)
    return forward


def _prepare_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    algorithm: str,
) -> Backward | None:
    """How the gradients of a layer are computed; None: densely."""
    shape = conv_shape(input, weight.shape, *geometry)
    active = active_weights(mask)
    if not chooses_sparse(shape, input, weight, mask, active.count, algorithm):
        return None
    source, factor = evenly_spaced(input), evenly_spaced(grad_output)
    target = evenly_spaced(torch.empty_like(source))
    backward = Backward(
        call_of(active, shape, "input_gradient", weight, target, factor),
        call_of(active, shape, "forward", weight, source, factor),
    )
    if source is input and factor is grad_output:
        signature = _backward_signature(grad_output, input, weight, bias, geometry, algorithm)
        active.keep(signature, backward)
    return backward


def conv_shape(
    input: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Shape:
    """The shape of a convolution of (N, C, H, W) with (O, C / groups, KH, KW)."""
    out_channels, _, *kernel = weight_shape
    return Shape._make((*input.shape, out_channels, *kernel, *stride, *padding, *dilation, groups))


def output_size(shape: Shape) -> tuple[int, ...]:
    """(N, C, H, W)."""
    return (shape.batch, shape.out_channels, *shape.output_size)


def call_of(
    active: ActiveWeights, shape: Shape, direction: Direction, weight: Tensor, *images: Tensor
) -> Call:
    """How an operator is called for a weight, contiguous or channels_last, and its input and output."""
    in_place = reads_in_place(shape, active.count, direction, *images)
    return active.call(shape, Access(not weight.is_contiguous(), in_place), direction)


def evenly_spaced(tensor: Tensor) -> Tensor:
    """The tensor, or a copy whose pixels are the same distance apart, as the kernels want them."""
    if tensor.dim() == 2:
        return tensor
    one_row_or_column = tensor.size(2) <= 1 or tensor.size(3) <= 1
    even = one_row_or_column or tensor.stride(2) == tensor.size(3) * tensor.stride(3)
    return tensor if even else tensor.contiguous()
