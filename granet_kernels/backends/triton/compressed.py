"""Convolution and linear layer of a weight that is stored as its non-zeros, for inference.

Through the dense weight: a GPU computes dense layers faster than any that skip single weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from granet_kernels.backends.triton.mask import unpack_mask
from granet_kernels.layout import conv_memory_format


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
    dtype = torch.promote_types(input.dtype, torch.float32)
    weight = decompress(values, mask, weight_shape).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    output = F.conv2d(input.to(dtype), weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        output += residual
    output = (output.relu_() if relu else output).to(input.dtype)
    return output.contiguous(memory_format=conv_memory_format(input, input))


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
    dtype = torch.promote_types(input.dtype, torch.float32)
    weight = decompress(values, mask, weight_shape).to(dtype)
    output = F.linear(input.to(dtype), weight, None if bias is None else bias.to(dtype))
    return (output.relu_() if relu else output).to(input.dtype)


def decompress(values: Tensor, mask: Tensor, shape: Sequence[int]) -> Tensor:
    """The dense weight: the values, in row-major order, where the bit is 1, +0.0 elsewhere."""
    active = unpack_mask(mask, torch.Size(shape).numel()).view(torch.Size(shape))
    return values.new_zeros(torch.Size(shape)).masked_scatter_(active, values)
