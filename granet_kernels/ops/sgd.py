"""The optimizer step on masked weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from granet_kernels.layout import is_dense, packed_length
from granet_kernels.ops.checks import (
    FLOATING,
    check_disjoint,
    check_floating,
    check_lengths,
    check_like,
    check_masked,
    check_momenta,
    check_scalar,
    describe,
    dtype_name,
    fail,
)
from granet_kernels.ops.define import define


def check_masked_sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    masks: Sequence[Tensor],
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
    lr_tensor: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    if not params or not _agree(params, grads, momenta or params, masks):
        _check_each(params, grads, momenta, masks)
    if momentum != 0:
        check_lengths(params=params, momenta=momenta)
    for name, scalar in (
        ("lr_tensor", lr_tensor),
        ("grad_scale", grad_scale),
        ("found_inf", found_inf),
    ):
        if scalar is not None:
            check_scalar(name, scalar, params[0])


def _agree(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    masks: Sequence[Tensor],
) -> bool:
    """True only if all is well with the tensors: one pass over them, and what is usual passes it.

    Of ResNet-50's 54 weights it takes 0.1 ms, and _check_each twice that.
    """
    if not len(params) == len(grads) == len(momenta) == len(masks):
        return False
    device, dtype, momentum_dtype = params[0].device, params[0].dtype, momenta[0].dtype
    if dtype not in FLOATING or momentum_dtype not in FLOATING:
        return False
    for param, grad, momentum, mask in zip(params, grads, momenta, masks, strict=True):
        shape = param.shape
        if not (
            param.dtype == grad.dtype == dtype
            and momentum.dtype == momentum_dtype
            and mask.dtype == torch.uint8
            and param.device == grad.device == momentum.device == mask.device == device
            and grad.shape == shape
            and momentum.shape == shape
            and momentum.stride() == param.stride()
            and is_dense(param)
            and mask.dim() == 1
            and mask.numel() == packed_length(param.numel())
            and mask.is_contiguous()
        ):
            return False
    return True


def _check_each(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    masks: Sequence[Tensor],
) -> None:
    """Raise the error of the first tensor that is not as it should be."""
    check_masked("params", params, masks)
    check_lengths(params=params, grads=grads)
    for i, (grad, param) in enumerate(zip(grads, params, strict=True)):
        check_floating(f"grads[{i}]", grad)
        check_like(f"grads[{i}]", grad, param, f"params[{i}]")
        if param.dtype != params[0].dtype or grad.dtype != param.dtype:
            pair = f"params[{i}] {dtype_name(param.dtype)} and grads[{i}] {dtype_name(grad.dtype)}"
            fail(f"grads[{i}]", f"{dtype_name(params[0].dtype)} throughout, as params[0] is", pair)
    check_momenta(momenta, params, "params")
    for i, buffer in enumerate(momenta):
        if buffer.dtype != momenta[0].dtype:
            fail(
                f"momenta[{i}]",
                f"{dtype_name(momenta[0].dtype)}, as momenta[0] is",
                describe(buffer),
            )


def check_masked_sgd_data(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    masks: Sequence[Tensor],
    **_: object,
) -> None:
    check_disjoint(reads=[*grads, *masks], params=params, momenta=momenta)


define(
    "masked_sgd_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor[] masks, *, float lr, "
    "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, bool first, "
    "Tensor? lr_tensor=None, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()",
    check=check_masked_sgd,
    check_data=check_masked_sgd_data,
)
