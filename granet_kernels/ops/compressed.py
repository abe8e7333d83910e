"""Convolution and linear layer of a weight that is stored as its non-zeros, for inference.

``values`` are the active weights in row-major order of the weight, ``mask`` says where they belong:
packed bits in that same order, whatever the layout of the input. Both are taken to be immutable:
a backend may keep what it derives from them for as long as the tensors live.

The output is ``conv(input, weight) + bias + residual``, negatives set to zero if ``relu``; sums are
at least fp32 and rounded once, to the input's dtype. ``values``, ``bias`` and the input may differ
in dtype and are not rounded to one another's. The operators have no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from granet_kernels.layout import conv_memory_format, full_mask, packed_length
from granet_kernels.ops.checks import (
    check_algorithm,
    check_device,
    check_floating,
    describe,
    dtype_name,
    fail,
)
from granet_kernels.ops.conv import check_geometry, output_size
from granet_kernels.ops.define import define
from granet_kernels.ops.registry import implementation
from granet_kernels.weak_map import WeakTensorMap


def check_weight(
    input: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, weight_shape: Sequence[int]
) -> None:
    """Metadata of the stored weight and of its bias."""
    check_floating("input", input)
    check_floating("values", values)
    if min(weight_shape) < 0:
        fail("weight_shape", "sizes of at least 0", list(weight_shape))
    numel = math.prod(weight_shape)
    if values.dim() != 1 or not values.is_contiguous() or values.size(0) > numel:
        fail("values", f"a contiguous 1-D tensor of at most {numel} elements", describe(values))
    length = packed_length(numel)
    if mask.dtype != torch.uint8 or tuple(mask.shape) != (length,) or not mask.is_contiguous():
        purpose = f"the packed mask of {tuple(weight_shape)} weights"
        fail("mask", f"uint8 ({length},), {purpose}", describe(mask))
    check_device("mask", mask, values, "values")
    check_device("input", input, values, "values")
    if bias is not None:
        check_floating("bias", bias)
        check_device("bias", bias, values, "values")
        if bias.dim() != 1 or bias.size(0) != weight_shape[0]:
            fail("bias", f"shape ({weight_shape[0]},)", describe(bias))


_checked: WeakTensorMap[tuple[int, int]] = WeakTensorMap()
"""Of masks that have been counted: their version, and how many bits are set."""


def check_active(values: Tensor, mask: Tensor, weight_shape: Sequence[int]) -> None:
    """One value for each active bit, and no bit behind the last weight; a mask is read once."""
    version = 0 if mask.is_inference() else mask._version
    known = _checked.get(mask)
    if known is None or known[0] != version:
        known = (version, _count(mask, math.prod(weight_shape)))
        _checked[mask] = known
    if known[1] != values.size(0):
        fail("values", f"{known[1]} elements, one for each active bit of mask", values.size(0))


def _count(mask: Tensor, numel: int) -> int:
    if bool((mask & ~full_mask(numel, mask.device)).any()):
        fail("mask", f"zero bits behind the last of {numel} weights", "a set one")
    return int(implementation("count_active", mask.device.type)([mask]))


def check_compressed_conv2d(
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
) -> None:
    check_algorithm(algorithm)
    if len(weight_shape) != 4:
        fail("weight_shape", "4 sizes (out, in / groups, height, width)", list(weight_shape))
    check_weight(input, values, mask, bias, weight_shape)
    check_geometry(input, weight_shape, stride, padding, dilation, groups)
    if residual is None:
        return
    check_device("residual", residual, input, "input")
    size = output_size(input, weight_shape, stride, padding, dilation)
    if tuple(residual.shape) != size or residual.dtype != input.dtype:
        fail("residual", f"{dtype_name(input.dtype)} {size}", describe(residual))


def fake_compressed_conv2d(
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
    size = output_size(input, weight_shape, stride, padding, dilation)
    return input.new_empty(size).contiguous(memory_format=conv_memory_format(input, input))


def check_data_conv2d(
    input: Tensor,
    values: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight_shape: Sequence[int],
    *rest: Any,
    algorithm: str = "auto",
) -> None:
    check_active(values, mask, weight_shape)


define(
    "compressed_conv2d",
    "(Tensor input, Tensor values, Tensor mask, Tensor? bias, Tensor? residual, "
    "SymInt[4] weight_shape, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
    'SymInt groups, bool relu, *, str algorithm="auto") -> Tensor',
    check=check_compressed_conv2d,
    fake=fake_compressed_conv2d,
    check_data=check_data_conv2d,
)


def check_compressed_linear(
    input: Tensor,
    values: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    weight_shape: Sequence[int],
    relu: bool,
    *,
    algorithm: str = "auto",
) -> None:
    check_algorithm(algorithm)
    if len(weight_shape) != 2:
        fail("weight_shape", "2 sizes (out_features, in_features)", list(weight_shape))
    check_weight(input, values, mask, bias, weight_shape)
    if input.dim() < 1 or input.size(-1) != weight_shape[1]:
        fail("input", f"{weight_shape[1]} features in the last dimension", describe(input))


define(
    "compressed_linear",
    "(Tensor input, Tensor values, Tensor mask, Tensor? bias, SymInt[2] weight_shape, bool relu, *, "
    'str algorithm="auto") -> Tensor',
    check=check_compressed_linear,
    fake=lambda input, values, mask, bias, weight_shape, relu, **_: input.new_empty(
        (*input.shape[:-1], weight_shape[0])
    ),
    check_data=lambda input, values, mask, bias, weight_shape, relu, **_: check_active(
        values, mask, weight_shape
    ),
)
