"""Two-dimensional convolution with a masked weight.

The compute dtype is the input's; the weight may be kept in another (fp32 under autocast) and is
masked and cast on the way in. The output is channels_last in memory where the input or the weight
is, and contiguous otherwise; gradients have the layout and dtype of what they are gradients of.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from granet_kernels.layout import conv_memory_format
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
from granet_kernels.ops.define import define


def check_masked_conv2d(
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
) -> None:
    check_algorithm(algorithm)
    check_floating("input", input)
    check_written("weight", weight)
    if weight.dim() != 4:
        fail(
            "weight",
            "4 dimensions (out_channels, in_channels / groups, height, width)",
            describe(weight),
        )
    check_mask("mask", mask, weight, "weight")
    check_device("input", input, weight, "weight")
    check_bias(bias, weight)
    check_geometry(input, weight.shape, stride, padding, dilation, groups)


def check_geometry(
    input: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """Whether the sizes fit one another."""
    if input.dim() != 4:
        fail("input", "4 dimensions (batch, channels, height, width)", describe(input))
    if groups < 1 or weight_shape[0] % groups:
        fail("groups", f"a divisor of the {weight_shape[0]} output channels", groups)
    if input.size(1) != weight_shape[1] * groups:
        fail("input", f"{weight_shape[1] * groups} channels", describe(input))
    for name, values, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if len(values) != 2 or min(values) < least:
            fail(name, f"two integers of at least {least}", list(values))
    if min(output_size(input, weight_shape, stride, padding, dilation)[2:]) < 1:
        fail("input", "a padded image no smaller than the dilated kernel", describe(input))


def output_size(
    input: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    """The shape of the output."""
    height, width = (
        (input.size(d + 2) + 2 * padding[d] - dilation[d] * (weight_shape[d + 2] - 1) - 1)
        // stride[d]
        + 1
        for d in range(2)
    )
    return input.size(0), weight_shape[0], height, width


def fake_masked_conv2d(
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
    size = output_size(input, weight.shape, stride, padding, dilation)
    return input.new_empty(size).contiguous(memory_format=conv_memory_format(input, weight))


define(
    "masked_conv2d",
    "(Tensor input, Tensor weight, Tensor mask, Tensor? bias, SymInt[2] stride, SymInt[2] padding, "
    'SymInt[2] dilation, SymInt groups, *, str algorithm="auto") -> Tensor',
    check=check_masked_conv2d,
    fake=fake_masked_conv2d,
)


def check_masked_conv2d_backward(
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
) -> None:
    check_masked_conv2d(
        input, weight, mask, bias, stride, padding, dilation, groups, algorithm=algorithm
    )
    check_flag("dense_grad", dense_grad, weight)
    size = output_size(input, weight.shape, stride, padding, dilation)
    check_grad_output(grad_output, size, input)
    check_needs(needs, bias)


def fake_gradients(
    input: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> list[Tensor]:
    """One tensor for each gradient that is needed, in the order input, weight, bias."""
    wanted = [
        t
        for t, needed in zip((input, weight, bias), needs, strict=True)
        if needed and t is not None
    ]
    return [torch.empty_like(tensor) for tensor in wanted]


define(
    "masked_conv2d_backward",
    "(Tensor grad_output, Tensor input, Tensor weight, Tensor mask, Tensor? bias, Tensor dense_grad, "
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, bool[3] needs, "
    '*, str algorithm="auto") -> Tensor[]',
    check=check_masked_conv2d_backward,
    fake=lambda grad_output, input, weight, mask, bias, *rest, **_: fake_gradients(
        input, weight, bias, needs=rest[-1]
    ),
)
