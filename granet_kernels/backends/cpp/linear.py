"""Linear layer with a masked weight: a convolution of one pixel, sparse or dense.

The caller has checked the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from granet_kernels.backends.cpp.conv import (
    sparse_input_gradient,
    sparse_output,
    sparse_weight_gradient,
)
from granet_kernels.backends.cpp.cost import chooses_sparse
from granet_kernels.backends.cpp.index import (
    Access,
    Call,
    Direction,
    Shape,
    active_weights,
    described,
    forget,
    kept_calls,
)
from granet_kernels.backends.cpp.mask import mask_cast, mask_grad


def masked_linear(
    input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, *, algorithm: str = "auto"
) -> Tensor:
    """input @ (weight where active).T + bias, in the dtype of the input."""
    forward = call_of("forward", input, weight, mask, algorithm)
    if forward is None:
        bias = None if bias is None else bias.to(input.dtype)
        return F.linear(input, mask_cast(weight, mask, input.dtype), bias)
    output = input.new_empty((*input.shape[:-1], weight.size(0)))
    rows = output.view(-1, weight.size(0))
    if not sparse_output(rows, as_rows(input), weight, mask, bias, forward):
        forget(mask)
        return masked_linear(input, weight, mask, bias, algorithm=algorithm)
    return output


def masked_linear_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    dense_grad: Tensor,
    needs: Sequence[bool],
    *,
    algorithm: str = "auto",
) -> list[Tensor]:
    """Gradients of input, weight and bias, those that are needed; the weight's through the mask."""
    needs_input, needs_weight, needs_bias = needs
    gradients, is_known = [], True
    if needs_input:
        gradient = torch.empty_like(input)
        call = call_of("input_gradient", input, weight, mask, algorithm)
        if call is None:
            gradient.copy_(grad_output @ mask_cast(weight, mask, input.dtype))
        else:
            in_place = gradient.is_contiguous()
            rows = gradient if in_place else torch.empty(input.shape, dtype=input.dtype)
            is_known = sparse_input_gradient(
                rows.view(-1, input.size(-1)), as_rows(grad_output), weight, mask, call
            )
            if not in_place:
                gradient.copy_(rows)
        gradients.append(gradient)
    if needs_weight:
        call = call_of("forward", input, weight, mask, algorithm)
        if call is None or bool(dense_grad):
            grad_weight = as_rows(grad_output).t() @ as_rows(input)
            gradients.append(mask_grad(grad_weight, weight, mask, dense_grad))
        else:
            gradient = torch.empty_like(weight)
            rows = as_rows(grad_output)
            is_known &= sparse_weight_gradient(gradient, rows, as_rows(input), mask, call)
            gradients.append(gradient)
    if not is_known:
        forget(mask)
        return masked_linear_backward(
            grad_output, input, weight, mask, bias, dense_grad, needs, algorithm=algorithm
        )
    if needs_bias and bias is not None:
        gradients.append(torch.empty_like(bias).copy_(as_rows(grad_output).sum(0)))
    return gradients


def call_of(
    direction: Direction, input: Tensor, weight: Tensor, mask: Tensor, algorithm: str
) -> Call | None:
    """How a layer's output or its input's gradient is computed; None: densely."""
    signature = (direction, *described(input), *described(weight), algorithm)
    call: Call | None = kept_calls(mask, signature)
    if call is not None:
        return call
    shape = linear_shape(input, weight.shape)
    active = active_weights(mask)
    if not chooses_sparse(shape, input, weight, mask, active.count, algorithm):
        return None
    call = active.call(shape, Access(channels_last=False, in_place=False), direction)
    active.keep(signature, call)
    return call


def linear_shape(input: Tensor, weight_shape: Sequence[int]) -> Shape:
    """A linear layer as a convolution: every row of the input is an image of one pixel."""
    rows = input.numel() // max(input.size(-1), 1) if input.size(-1) else 0
    return Shape(rows, weight_shape[1], 1, 1, weight_shape[0], 1, 1, 1, 1, 0, 0, 1, 1, 1)


def as_rows(tensor: Tensor) -> Tensor:
    """(…, features) as (rows, features)."""
    if tensor.dim() == 2:  # as usual; each of torch's functions takes a microsecond
        return tensor
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor.flatten(0, -2)
