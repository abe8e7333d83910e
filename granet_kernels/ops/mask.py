"""Operators on masks: packing, counting, zeroing, and the masked cast with its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from granet_kernels.layout import packed_length
from granet_kernels.ops.checks import (
    FLOATING,
    check_device,
    check_disjoint,
    check_flag,
    check_floating,
    check_like,
    check_mask,
    check_masked,
    check_not_empty,
    check_packed,
    check_written,
    describe,
    dtype_name,
    fail,
)
from granet_kernels.ops.define import define


def check_pack_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.dim() != 1 or not mask.is_contiguous():
        fail("mask", "a contiguous 1-D bool tensor", describe(mask))


define(
    "pack_mask",
    "(Tensor mask) -> Tensor",
    check=check_pack_mask,
    fake=lambda mask: mask.new_empty(packed_length(mask.numel()), dtype=torch.uint8),
)


def check_unpack_mask(packed: Tensor, numel: int) -> None:
    check_packed("packed", packed)
    if numel < 0 or packed.numel() != packed_length(numel):
        fail(
            "packed",
            f"{packed_length(max(numel, 0))} bytes, the mask of {numel} elements",
            packed.numel(),
        )


define(
    "unpack_mask",
    "(Tensor packed, SymInt numel) -> Tensor",
    check=check_unpack_mask,
    fake=lambda packed, numel: packed.new_empty(numel, dtype=torch.bool),
)


def check_count_active(masks: Sequence[Tensor]) -> None:
    check_not_empty("masks", masks)
    for i, mask in enumerate(masks):
        check_packed(f"masks[{i}]", mask)
        check_device(f"masks[{i}]", mask, masks[0], "masks[0]")


define(
    "count_active",
    "(Tensor[] masks) -> Tensor",
    check=check_count_active,
    fake=lambda masks: masks[0].new_empty(len(masks), dtype=torch.int64),
)


define(
    "zero_inactive_",
    "(Tensor(a!)[] tensors, Tensor[] masks) -> ()",
    check=lambda tensors, masks: check_masked("tensors", tensors, masks),
    check_data=lambda tensors, masks: check_disjoint(reads=masks, tensors=tensors),
)


def check_mask_cast(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> None:
    check_written("weight", weight)
    check_mask("mask", mask, weight, "weight")
    if dtype not in FLOATING:
        fail("dtype", "float32, bfloat16, float16 or float64", dtype_name(dtype))


define(
    "mask_cast",
    "(Tensor weight, Tensor mask, ScalarType dtype) -> Tensor",
    check=check_mask_cast,
    fake=lambda weight, mask, dtype: torch.empty_like(weight, dtype=dtype),
)


def check_mask_grad(grad: Tensor, weight: Tensor, mask: Tensor, dense_grad: Tensor) -> None:
    check_written("weight", weight)
    check_floating("grad", grad)
    check_like("grad", grad, weight, "weight")
    check_mask("mask", mask, weight, "weight")
    check_flag("dense_grad", dense_grad, weight)


define(
    "mask_grad",
    "(Tensor grad, Tensor weight, Tensor mask, Tensor dense_grad) -> Tensor",
    check=check_mask_grad,
    fake=lambda grad, weight, mask, dense_grad: torch.empty_like(weight),
)
