"""Linear layer with a masked weight: a convolution of one pixel, sparse or dense.

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
)
from granet_kernels.backends.cpp.mask import mask_cast, mask_grad
from granet_kernels.backends.cpp.memory import is_large
from granet_kernels.backends.cpp.sparse import Backward, Forward, sparse_gradients, sparse_output


def try_masked_linear(
    input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, *, algorithm: str = "auto"
) -> Any:
    """:func:`masked_linear` where a sparse call was alike, and so was checked; else ``NotImplemented``."""
    forward = kept_calls(mask, _signature("forward", algorithm, input, weight, bias))
    if forward is None:
        return NotImplemented
    return _sparse_forward(forward, input, weight, mask, bias)


def masked_linear(
    input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, *, algorithm: str = "auto"
) -> Tensor:
    """input @ (weight where active).T + bias, in the dtype of the input."""
    output: Any = NotImplemented
    while output is NotImplemented:  # again, should someone write to the mask meanwhile
        active = _active_if_sparse(input, weight, mask, algorithm)
        if active is None:
            bias = None if bias is None else bias.to(input.dtype)
            return F.linear(input, mask_cast(weight, mask, input.dtype), bias)
        size = as_rows(input).size(0), weight.size(0)
        call = _call_of(active, "forward", input, weight)
        large = size if is_large(size, input.dtype) else None
        forward = Forward(call, torch.contiguous_format, large)
        active.keep(_signature("forward", algorithm, input, weight, bias), forward)
        output = _sparse_forward(forward, input, weight, mask, bias)
    return output  # type: ignore[no-any-return]


def try_masked_linear_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    dense_grad: Tensor,
    needs: Sequence[bool],
    *,
    algorithm: str = "auto",
) -> Any:
    """:func:`masked_linear_backward` where a sparse call was alike; else ``NotImplemented``."""
    signature = _signature("backward", algorithm, input, weight, bias, grad_output)
    backward = kept_calls(mask, signature)
    if backward is None or (needs[1] and bool(dense_grad)):
        return NotImplemented
    return _sparse_backward(backward, grad_output, input, weight, mask, bias, needs)


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
    dense_weight = needs[1] and bool(dense_grad)  # then its gradient alone is computed densely
    tensors = (grad_output, input, weight, mask, bias)
    gradients: Any = NotImplemented
    while gradients is NotImplemented:  # again, should someone write to the mask meanwhile
        active = _active_if_sparse(input, weight, mask, algorithm)
        if active is None:
            return _dense_backward(*tensors, dense_grad, needs)
        backward = Backward(
            _call_of(active, "input_gradient", input, weight),
            _call_of(active, "forward", input, weight),
        )
        signature = _signature("backward", algorithm, input, weight, bias, grad_output)
        active.keep(signature, backward)
        sparse_needs = [needs[0], False, False] if dense_weight else needs
        gradients = _sparse_backward(backward, *tensors, sparse_needs)
    if dense_weight:
        gradients += _dense_backward(*tensors, dense_grad, [False, *needs[1:]])
    return gradients  # type: ignore[no-any-return]


def _dense_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    dense_grad: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    gradients = []
    if needs[0]:
        grad_input = grad_output @ mask_cast(weight, mask, input.dtype)
        gradients.append(torch.empty_like(input).copy_(grad_input))
    if needs[1]:
        grad_weight = as_rows(grad_output).t() @ as_rows(input)
        gradients.append(mask_grad(grad_weight, weight, mask, dense_grad))
    if needs[2] and bias is not None:
        gradients.append(bias_gradient(bias, grad_output))
    return gradients


def _sparse_forward(
    forward: Forward, input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None
) -> Any:
    """The output; ``NotImplemented`` where the mask has other bits than when this was prepared."""
    output = sparse_output(as_rows(input), weight, mask, bias, forward)
    if output is NotImplemented or input.dim() == 2:
        return output
    return output.view(*input.shape[:-1], weight.size(0))


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
    rows = as_rows(grad_output), as_rows(input)
    gradients = sparse_gradients(*rows, weight, mask, backward, needs[:2])
    if gradients is NotImplemented:
        return gradients
    if needs[0] and input.dim() != 2:
        gradients[0] = _in_layout_of(input, gradients[0].view(input.shape))
    if needs[2] and bias is not None:
        gradients.append(bias_gradient(bias, grad_output))
    return gradients


def _in_layout_of(input: Tensor, gradient: Tensor) -> Tensor:
    """A contiguous gradient as ``torch.empty_like(input)`` lies in memory."""
    if input.is_contiguous() or (like := torch.empty_like(input)).is_contiguous():
        return gradient
    return like.copy_(gradient)


def bias_gradient(bias: Tensor, grad_output: Tensor) -> Tensor:
    return torch.empty_like(bias).copy_(as_rows(grad_output).sum(0))


def _active_if_sparse(
    input: Tensor, weight: Tensor, mask: Tensor, algorithm: str
) -> ActiveWeights | None:
    """The active weights; None where the layer is computed densely."""
    active = active_weights(mask)
    shape = linear_shape(input, weight.shape)
    is_sparse = chooses_sparse(shape, input, weight, mask, active.count, algorithm)
    return active if is_sparse else None


def _call_of(active: ActiveWeights, direction: Direction, input: Tensor, weight: Tensor) -> Call:
    access = Access(channels_last=False, in_place=False)
    return active.call(linear_shape(input, weight.shape), access, direction)


def _signature(step: str, algorithm: str, *tensors: Tensor | None) -> Signature:
    return (step, algorithm, *map(described, tensors))


def linear_shape(input: Tensor, weight_shape: Sequence[int]) -> Shape:
    """A linear layer as a convolution: every row of the input is an image of one pixel."""
    rows = input.numel() // max(input.size(-1), 1) if input.size(-1) else 0
    return Shape(rows, weight_shape[1], 1, 1, weight_shape[0], 1, 1, 1, 1, 0, 0, 1, 1, 1)


def as_rows(tensor: Tensor) -> Tensor:
    """(…, features) as (rows, features)."""
    if tensor.dim() == 2:  # as usual; each of torch's functions takes a microsecond
        return tensor
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor.flatten(0, -2)
