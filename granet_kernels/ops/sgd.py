"""The optimizer step on masked weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from granet_kernels.ops.checks import (
    check_average,
    check_average_decay,
    check_disjoint,
    check_floating,
    check_lengths,
    check_like,
    check_masked,
    check_momenta,
    check_scalar,
    check_written,
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
    averages: Sequence[Tensor] | None = None,
    average_decay: float = 0.0,
) -> None:
    _check_each(params, grads, momenta, masks)
    if momentum != 0:
        check_lengths(params=params, momenta=momenta)
    check_average_decay(average_decay)
    _check_averages(averages or [], params)
    for name, scalar in (
        ("lr_tensor", lr_tensor),
        ("grad_scale", grad_scale),
        ("found_inf", found_inf),
    ):
        if scalar is not None:
            check_scalar(name, scalar, params[0])


def is_usual(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    masks: Sequence[Tensor],
    *,
    momentum: float,
    lr_tensor: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    averages: Sequence[Tensor] | None = None,
    average_decay: float = 0.0,
    **_: object,
) -> bool:
    """A judgement of compiled code; without it every step is checked in Python."""
    judge = _compiled_judge()
    scalars = (lr_tensor, grad_scale, found_inf)
    return (
        judge is not None
        and bool(momenta) == (momentum != 0)
        and all(scalar is None for scalar in scalars)
        and 0 <= average_decay <= 1
        and judge(params, grads, momenta, masks, averages or [])
    )


@functools.cache
def _compiled_judge() -> Callable[..., bool] | None:
    try:
        from granet_kernels.backends import cpp  # noqa: F401  (loads the operators, or cannot)
    except ImportError:
        return None
    return torch.ops.granet_cpp.is_usual_step.default


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


def _check_averages(averages: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """None at all, or one for each parameter.

    Never of 16 bits: a thousandth of the distance to the weight is less than what 8 or 11 bits can
    tell, is lost when it is added, and the average stands still.
    """
    if not averages:
        return
    check_lengths(params=params, averages=averages)
    for i, (average, param) in enumerate(zip(averages, params, strict=True)):
        check_written(f"averages[{i}]", average)
        check_average(f"averages[{i}]", average, param, f"params[{i}]")


def check_masked_sgd_data(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    masks: Sequence[Tensor],
    *,
    averages: Sequence[Tensor] | None = None,
    **_: object,
) -> None:
    reads = [*grads, *masks]
    check_disjoint(reads, params=params, momenta=momenta, averages=averages or [])


define(
    "masked_sgd_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor[] masks, *, float lr, "
    "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, bool first, "
    "Tensor? lr_tensor=None, Tensor? grad_scale=None, Tensor? found_inf=None, "
    # A list of tensors can have no other default than None.
    "Tensor(c!)[]? averages=None, float average_decay=0.0) -> ()",
    check=check_masked_sgd,
    check_data=check_masked_sgd_data,
    is_usual=is_usual,
)
