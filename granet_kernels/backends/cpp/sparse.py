"""What convolutions and linear layers share: calls of the compiled operators of ``csrc/torch/conv.cpp``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from granet_kernels.backends.cpp.index import Call


class Backward(NamedTuple):
    """How the gradients of a sparse layer are computed."""

    input: Call
    weight: Call
    writes_as_is: bool
    """Whether the kernels can write a gradient that has the input's layout."""


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


def sparse_gradients(
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    backward: Backward,
) -> bool:
    """Write the gradients that are given: the input's from the active weights, the weight's where active,
    zero elsewhere. False as above."""
    known, entries, shape, in_place, fetched = backward.input
    values = fetched.values(weight, input.dtype)
    stored = room_for(known[1]) if values is None else values
    done: bool = torch.ops.granet_cpp.masked_conv_backward_.default(
        *(grad_input, grad_weight, grad_output, input, weight, stored, values is not None),
        *(mask, known, entries, backward.weight.entries, shape),
        *(in_place, backward.weight.in_place),
    )
    return done


def room_for(positions: Tensor) -> Tensor:
    """For the values of the active weights at these positions."""
    return torch.empty(positions.shape, dtype=torch.float32, device="cpu")
