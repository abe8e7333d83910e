"""Linear layer with a masked weight; dtypes and layouts as in :mod:`granet_kernels.ops.conv`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from granet_kernels.ops.checks import (
    check_algorithm,
    check_bias,
    check_device,
    check_flag,
    check_floating,
    check_grad_output,
    check_mask,
    check_needs,
    check_written,
    describe,
    fail,
)
from granet_kernels.ops.conv import fake_gradients
from granet_kernels.ops.define import define


def check_masked_linear(
    input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, *, algorithm: str = "auto"
) -> None:
    check_algorithm(algorithm)
    check_floating("input", input)
    check_written("weight", weight)
    if weight.dim() != 2:
        fail("weight", "2 dimensions (out_features, in_features)", describe(weight))
    check_mask("mask", mask, weight, "weight")
    check_device("input", input, weight, "weight")
    if input.dim() < 1 or input.size(-1) != weight.size(1):
        fail("input", f"{weight.size(1)} features in the last dimension", describe(input))
    check_bias(bias, weight)


define(
    "masked_linear",
    '(Tensor input, Tensor weight, Tensor mask, Tensor? bias, *, str algorithm="auto") -> Tensor',
    check=check_masked_linear,
    fake=lambda input, weight, mask, bias, **_: input.new_empty(
        (*input.shape[:-1], weight.size(0))
    ),
)


def check_masked_linear_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    dense_grad: Tensor,
    needs: Sequence[bool],
    *,
    algorithm: str = "auto",
) -> None:
    check_masked_linear(input, weight, mask, bias, algorithm=algorithm)
    check_flag("dense_grad", dense_grad, weight)
    size = (*input.shape[:-1], weight.size(0))
    check_grad_output(grad_output, size, input)
    check_needs(needs, bias)


define(
    "masked_linear_backward",
    "(Tensor grad_output, Tensor input, Tensor weight, Tensor mask, Tensor? bias, Tensor dense_grad, "
    'bool[3] needs, *, str algorithm="auto") -> Tensor[]',
    check=check_masked_linear_backward,
    fake=lambda grad_output, input, weight, mask, bias, dense_grad, needs, **_: fake_gradients(
        input, weight, bias, needs
    ),
)
