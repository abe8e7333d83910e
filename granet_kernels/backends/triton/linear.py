"""Linear layer with a masked weight: PyTorch's, on the masked weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from granet_kernels.backends.triton.cast import in_form_of, mask_cast, mask_grad


def masked_linear(
    input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, *, algorithm: str = "auto"
) -> Tensor:
    """input @ (weight where active).T + bias, in the dtype of the input; there is one algorithm."""
    masked = mask_cast(weight, mask, input.dtype)
    bias = None if bias is None else bias.to(input.dtype)
    return F.linear(input, masked, bias)


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
    rows = torch.atleast_2d(grad_output).flatten(0, -2)  # not view(-1, n): n may be 0
    gradients = []
    if needs[0]:
        grad_input = grad_output @ mask_cast(weight, mask, input.dtype)
        gradients.append(in_form_of(input, grad_input))
    if needs[1]:
        grad_weight = rows.t() @ torch.atleast_2d(input).flatten(0, -2)
        gradients.append(mask_grad(grad_weight, weight, mask, dense_grad))
    if needs[2] and bias is not None:
        gradients.append(in_form_of(bias, rows.sum(0)))
    return gradients
