"""The update of torch.optim.SGD, computed by ``csrc/cpu/sgd.cpp``; the caller has checked the arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from granet_kernels.layout import aligned


def try_masked_sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    masks: list[Tensor],
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
    averages: list[Tensor] | None = None,
    average_decay: float = 0.0,
) -> Any:
    """:func:`masked_sgd_` where compiled code finds the arguments right; else ``NotImplemented``."""
    if not params or not (lr_tensor is grad_scale is found_inf is None):
        return NotImplemented
    done = torch.ops.granet_cpp.try_masked_sgd_.default(
        params,
        grads,
        momenta,
        masks,
        lr,
        momentum,
        dampening,
        weight_decay,
        nesterov,
        maximize,
        first,
        averages or [],
        average_decay,
    )
    return None if done else NotImplemented


def masked_sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    masks: list[Tensor],
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
    averages: list[Tensor] | None = None,
    average_decay: float = 0.0,
) -> None:
    """``w``, ``v`` and averages where active, in fp32 (fp64 for fp64 tensors); inactive ones keep their bits.

    Gradients may have any strides; one with other strides than its parameter's is copied first.
    Nothing changes where ``found_inf`` is not zero.
    """
    if found_inf is not None and float(found_inf) != 0:
        return
    torch.ops.granet_cpp.masked_sgd_.default(
        params,
        [_in_order_of(param, grad) for param, grad in zip(params, grads, strict=True)],
        momenta,
        masks,
        lr if lr_tensor is None else float(lr_tensor),
        momentum,
        dampening,
        weight_decay,
        1.0 if grad_scale is None else float(grad_scale),
        nesterov,
        maximize,
        first,
        averages or [],
        average_decay,
    )


def _in_order_of(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient with its elements in memory in the order of the parameter's, without gaps."""
    return grad if grad.stride() == param.stride() else aligned(grad, like=param).contiguous()
