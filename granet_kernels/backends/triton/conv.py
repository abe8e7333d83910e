"""Two-dimensional convolution with a masked weight: PyTorch's, on the masked weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from granet_kernels.backends.triton.cast import in_form_of, mask_cast, mask_grad
from granet_kernels.layout import conv_memory_format


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
    """conv2d(input, weight where active), in the dtype of the input; there is one algorithm."""
    masked = mask_cast(weight, mask, input.dtype)
    bias = None if bias is None else bias.to(input.dtype)
    output = F.conv2d(input, masked, bias, stride, padding, dilation, groups)
    return output.contiguous(memory_format=conv_memory_format(input, weight))


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
    of_shape = torch.empty_like(weight, dtype=input.dtype)  # all that the other gradients look at
    masked = mask_cast(weight, mask, input.dtype) if needs[0] else of_shape
    grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_output,
        input,
        masked,
        None if bias is None else list(bias.shape),
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        needs,
    )
    gradients = []
    if needs[0]:
        gradients.append(in_form_of(input, grad_input))
    if needs[1]:
        gradients.append(mask_grad(grad_weight, weight, mask, dense_grad))
    if needs[2] and bias is not None:
        gradients.append(in_form_of(bias, grad_bias))
    return gradients
