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
from granet_kernels.backends.cpp.index import Access, Shape, active_weights
from granet_kernels.backends.cpp.mask import mask_cast, mask_grad


def masked_linear(
    input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, *, algorithm: str = "auto"
) -> Tensor:
    """input @ (weight where active).T + bias, in the dtype of the input."""
    shape = linear_shape(input, weight.shape)
    active = active_weights(mask)
    if not chooses_sparse(shape, input, weight, mask, active.count, algorithm):
        bias = None if bias is None else bias.to(input.dtype)
        return F.linear(input, mask_cast(weight, mask, input.dtype), bias)
    output = input.new_empty((*input.shape[:-1], weight.size(0)))
    access = Access(channels_last=False, in_place=False)
    index = active.index(shape, access, "forward")
    values = active.values(weight, index, input.dtype)
    sparse_output(
        output.view(-1, weight.size(0)), as_rows(input), index, values, bias, shape, access
    )
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
    shape = linear_shape(input, weight.shape)
    needs_input, needs_weight, needs_bias = needs
    active = active_weights(mask)
    sparse = chooses_sparse(shape, input, weight, mask, active.count, algorithm)
    gradients = []
    if needs_input:
        gradient = torch.empty_like(input)
        if sparse:
            rows = torch.empty((shape.batch, shape.channels), dtype=input.dtype)
            sparse_input_gradient(rows, as_rows(grad_output), weight, active, shape)
            gradient.copy_(rows.view(input.shape))
        else:
            gradient.copy_(grad_output @ mask_cast(weight, mask, input.dtype))
        gradients.append(gradient)
    if needs_weight:
        if sparse and not bool(dense_grad):
            gradient = torch.empty_like(weight)
            sparse_weight_gradient(gradient, as_rows(grad_output), as_rows(input), active, shape)
            gradients.append(gradient)
        else:
            grad_weight = as_rows(grad_output).t() @ as_rows(input)
            gradients.append(mask_grad(grad_weight, weight, mask, dense_grad))
    if needs_bias and bias is not None:
        gradients.append(torch.empty_like(bias).copy_(as_rows(grad_output).sum(0)))
    return gradients


def linear_shape(input: Tensor, weight_shape: Sequence[int]) -> Shape:
    """A linear layer as a convolution: every row of the input is an image of one pixel."""
    rows = input.numel() // max(input.size(-1), 1) if input.size(-1) else 0
    return Shape(rows, weight_shape[1], 1, 1, weight_shape[0], 1, 1, 1, 1, 0, 0, 1, 1, 1)


def as_rows(tensor: Tensor) -> Tensor:
    """(…, features) as (rows, features)."""
    rows: Tensor = torch.atleast_2d(tensor)
    return rows.flatten(0, -2)
