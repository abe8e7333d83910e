"""Two-dimensional convolution with a masked weight: sparse by ``csrc/cpu/conv.cpp``, or dense.

The caller has checked the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
    active_weights,
    described,
    forget,
    kept_calls,
    reads_in_place,
)
from granet_kernels.backends.cpp.mask import mask_cast, mask_grad
from granet_kernels.layout import conv_memory_format


class Forward(NamedTuple):
    """How the output of a sparse layer is computed."""

    call: Call
    size: tuple[int, ...]
    memory_format: torch.memory_format


class Backward(NamedTuple):
    """How its gradients are."""

    input: Call
    weight: Call


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
    forward = forward_of(input, weight, mask, *geometry, algorithm)
    if forward is None:
        masked = mask_cast(weight, mask, input.dtype)
        bias = None if bias is None else bias.to(input.dtype)
        output = F.conv2d(input, masked, bias, *geometry)
        return output.contiguous(memory_format=conv_memory_format(input, weight))
    output = torch.empty(forward.size, dtype=input.dtype, memory_format=forward.memory_format)
    if not sparse_output(output, evenly_spaced(input), weight, mask, bias, forward.call):
        forget(mask)
        return masked_conv2d(input, weight, mask, bias, *geometry, algorithm=algorithm)
    return output


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
    needs_input, needs_weight, needs_bias = needs
    backward = backward_of(grad_output, input, weight, mask, *geometry, algorithm)
    sparse_weight = backward is not None and not bool(dense_grad)
    dense_needs = [needs_input and backward is None, needs_weight and not sparse_weight, False]
    if any(dense_needs):
        masked = mask_cast(weight, mask, input.dtype) if dense_needs[0] else weight.to(input.dtype)
        grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad_output, input, masked, None, *geometry[:3], False, [0, 0], groups, dense_needs
        )
    gradients, is_known = [], True
    if needs_input:
        gradient = torch.empty_like(input)
        if backward is None:
            gradient.copy_(grad_input)
        else:
            is_known = sparse_input_gradient(gradient, grad_output, weight, mask, backward.input)
        gradients.append(gradient)
    if needs_weight:
        if backward is None or not sparse_weight:
            gradients.append(mask_grad(grad_weight, weight, mask, dense_grad))
        else:
            gradient = torch.empty_like(weight)
            is_known &= sparse_weight_gradient(gradient, grad_output, input, mask, backward.weight)
            gradients.append(gradient)
    if not is_known:
        forget(mask)
        return masked_conv2d_backward(
            grad_output,
            input,
            weight,
            mask,
            bias,
            dense_grad,
            *geometry,
            needs,
            algorithm=algorithm,
        )
    if needs_bias and bias is not None:
        gradients.append(torch.empty_like(bias).copy_(grad_output.sum((0, 2, 3))))
    return gradients


def forward_of(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    algorithm: str,
) -> Forward | None:
    """How a layer is computed; None: densely."""
    signature = (
        "forward",
        *(*described(input), *described(weight)),
        *(*stride, *padding, *dilation, groups, algorithm),
    )
    forward: Forward | None = kept_calls(mask, signature)
    if forward is not None:
        return forward
    shape = conv_shape(input, weight.shape, stride, padding, dilation, groups)
    active = active_weights(mask)
    if not chooses_sparse(shape, input, weight, mask, active.count, algorithm):
        return None
    size, memory_format = output_size(shape), conv_memory_format(input, weight)
    output = torch.empty(size, dtype=input.dtype, memory_format=memory_format)
    call = call_of(active, shape, "forward", weight, evenly_spaced(input), output)
    forward = Forward(call, size, memory_format)
    active.keep(signature, forward)
    return forward


def backward_of(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    algorithm: str,
) -> Backward | None:
    """How the gradients of a layer are computed; None: densely."""
    signature = (
        *("backward", grad_output.stride()),
        *(*described(input), *described(weight)),
        *(*stride, *padding, *dilation, groups, algorithm),
    )
    backward: Backward | None = kept_calls(mask, signature)
    if backward is not None:
        return backward
    shape = conv_shape(input, weight.shape, stride, padding, dilation, groups)
    active = active_weights(mask)
    if not chooses_sparse(shape, input, weight, mask, active.count, algorithm):
        return None
    source, factor = evenly_spaced(input), evenly_spaced(grad_output)
    gradient = evenly_spaced(torch.empty_like(input))
    backward = Backward(
        call_of(active, shape, "input_gradient", weight, gradient, factor),
        call_of(active, shape, "forward", weight, source, factor),
    )
    active.keep(signature, backward)
    return backward


def sparse_output(
    output: Tensor, input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, call: Call
) -> bool:
    """Write the output of a layer; the bias is rounded to the input's dtype first.

    False, and nothing is written, where the mask has other bits than the call was made for.
    """
    bias = None if bias is None else bias.to(input.dtype).float().contiguous()
    known, entries, shape, in_place, fetched = call
    stored = room_for(known[1])
    done: bool = torch.ops.granet_cpp.masked_conv_.default(
        output, input, weight, stored, mask, known, entries, bias, shape, in_place
    )
    if done:
        fetched.keep(weight, input.dtype, stored)
    return done


def sparse_input_gradient(
    gradient: Tensor, grad_output: Tensor, weight: Tensor, mask: Tensor, call: Call
) -> bool:
    """Write the input's gradient, computed from the active weights alone; False as above."""
    target = evenly_spaced(gradient)
    known, entries, shape, in_place, fetched = call
    stored = fetched.values(weight, gradient.dtype)
    is_fetched = stored is not None
    if stored is None:
        stored = room_for(known[1])
    done: bool = torch.ops.granet_cpp.masked_conv_input_gradient_.default(
        *(target, evenly_spaced(grad_output), weight, stored, is_fetched),
        *(mask, known, entries, shape, in_place),
    )
    if target is not gradient:
        gradient.copy_(target)
    return done


def sparse_weight_gradient(
    gradient: Tensor, grad_output: Tensor, input: Tensor, mask: Tensor, call: Call
) -> bool:
    """Write the weight's gradient: computed where active, zero elsewhere; False as above."""
    done: bool = torch.ops.granet_cpp.masked_conv_weight_gradient_.default(
        *(gradient, evenly_spaced(grad_output), evenly_spaced(input), mask),
        *(call.known, call.entries, call.shape, call.in_place),
    )
    return done


def room_for(positions: Tensor) -> Tensor:
    """For the values of the active weights at these positions."""
    return torch.empty(positions.shape, dtype=torch.float32, device="cpu")


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
