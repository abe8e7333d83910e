"""Layers computed by PyTorch on the masked weight: what backends share that have no sparse layers.

A GPU computes a dense layer faster than any that skips single weights. A backend gives its own ways
to mask a weight and a gradient, and to unpack a mask, and takes the six operators as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from granet_kernels.layout import conv_memory_format


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseLayers:
    """The layers of a backend; its methods are the operators of the same names."""

    mask_cast: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    mask_grad: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    unpack_mask: Callable[[Tensor, int], Tensor]

    def masked_conv2d(
        self,
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
        masked = self.mask_cast(weight, mask, input.dtype)
        bias = None if bias is None else bias.to(input.dtype)
        output = F.conv2d(input, masked, bias, stride, padding, dilation, groups)
        return output.contiguous(memory_format=conv_memory_format(input, weight))

    def masked_conv2d_backward(
        self,
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
        of_shape = torch.empty_like(weight, dtype=input.dtype)  # all that the others look at
        masked = self.mask_cast(weight, mask, input.dtype) if needs[0] else of_shape
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
            gradients.append(self.mask_grad(grad_weight, weight, mask, dense_grad))
        if needs[2] and bias is not None:
            gradients.append(in_form_of(bias, grad_bias))
        return gradients

    def masked_linear(
        self,
        input: Tensor,
        weight: Tensor,
        mask: Tensor,
        bias: Tensor | None,
        *,
        algorithm: str = "auto",
    ) -> Tensor:
        """input @ (weight where active).T + bias, in the dtype of the input; there is one algorithm."""
        masked = self.mask_cast(weight, mask, input.dtype)
        bias = None if bias is None else bias.to(input.dtype)
        return F.linear(input, masked, bias)

    def masked_linear_backward(
        self,
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
        rows = torch.atleast_2d(grad_output).flatten(0, -2)  # not view(-1, n): n may be 0
        gradients = []
        if needs[0]:
            grad_input = grad_output @ self.mask_cast(weight, mask, input.dtype)
            gradients.append(in_form_of(input, grad_input))
        if needs[1]:
            grad_weight = rows.t() @ torch.atleast_2d(input).flatten(0, -2)
            gradients.append(self.mask_grad(grad_weight, weight, mask, dense_grad))
        if needs[2] and bias is not None:
            gradients.append(in_form_of(bias, rows.sum(0)))
        return gradients

    def compressed_conv2d(
        self,
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
        """conv2d(input, weight) + bias + residual, then ReLU; rounded once, to the input's dtype."""
        dtype = torch.promote_types(input.dtype, torch.float32)
        weight = self._decompress(values, mask, weight_shape).to(dtype)
        bias = None if bias is None else bias.to(dtype)
        output = F.conv2d(input.to(dtype), weight, bias, stride, padding, dilation, groups)
        if residual is not None:
            output += residual
        output = (output.relu_() if relu else output).to(input.dtype)
        return output.contiguous(memory_format=conv_memory_format(input, input))

    def compressed_linear(
        self,
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
        weight = self._decompress(values, mask, weight_shape).to(dtype)
        output = F.linear(input.to(dtype), weight, None if bias is None else bias.to(dtype))
        return (output.relu_() if relu else output).to(input.dtype)

    def _decompress(self, values: Tensor, mask: Tensor, shape: Sequence[int]) -> Tensor:
        """The dense weight: the values, in row-major order, where the bit is 1, +0.0 elsewhere."""
        active = self.unpack_mask(mask, torch.Size(shape).numel()).view(torch.Size(shape))
        return values.new_zeros(torch.Size(shape)).masked_scatter_(active, values)


def in_form_of(like: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the dtype and layout of what it is a gradient of; a copy where they differ."""
    if (gradient.dtype, gradient.stride()) == (like.dtype, like.stride()):
        return gradient
    return torch.empty_like(like).copy_(gradient)
