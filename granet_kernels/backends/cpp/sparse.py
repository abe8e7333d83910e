"""What convolutions and linear layers share: calls of the compiled operators of ``csrc/torch/conv.cpp``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from granet_kernels.backends.cpp.index import Call
from granet_kernels.backends.cpp.library import operator

_masked_conv = operator("masked_conv")
_masked_conv_backward = operator("masked_conv_backward")


class Forward(NamedTuple):
    """How the output of a sparse layer is computed."""

    call: Call
    memory_format: torch.memory_format
    """Of the output."""
    large: Sequence[int] | None
    """Its size, where its memory is kept."""


class Backward(NamedTuple):
    """How the gradients of a sparse layer are computed."""

    input: Call
    weight: Call


def sparse_output(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    forward: Forward,
) -> Any:
    """The output of a layer; the bias is rounded to the input's dtype first.

    ``NotImplemented``, and nothing is computed, where the mask has other bits than when this was prepared.
    """
    if bias is not None:
        bias = _as_float(bias, input.dtype)
    (known, entries, shape, in_place, fetched, memory), memory_format, large = forward
    target = None if large is None else memory.empty(large, input.dtype, memory_format)
    channels_last = memory_format == torch.channels_last
    done = _masked_conv(
        *(input, weight, mask, known, entries, bias, target, shape, in_place, channels_last)
    )
    if not done:
        return NotImplemented
    output, stored = done
    fetched.keep(weight, input.dtype, stored)
    return output


def sparse_gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    backward: Backward,
    needs: Sequence[bool],
) -> Any:
    """Gradients of input and weight, those that are needed: the input's from the active weights, the weight's
    where active, zero elsewhere. ``NotImplemented`` as above."""
    needs_input, needs_weight = needs
    if not (needs_input or needs_weight):
        return []
    known, entries, shape, in_place, fetched, memory = backward.input
    gradients = _masked_conv_backward(
        *(grad_output, input, weight, fetched.values(weight, input.dtype), mask, known, entries),
        *(backward.weight.entries, shape, in_place, backward.weight.in_place),
        memory.like(input) if needs_input else None,
        memory.like(weight) if needs_weight else None,
        *(needs_input, needs_weight),
    )
    return gradients or NotImplemented


def _as_float(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to a dtype, as float32; as it is where it is that already, as each call takes a microsecond."""
    if not bias.dtype == dtype == torch.float32:
        bias = bias.to(dtype).float()
    return bias if bias.is_contiguous() else bias.contiguous()
