"""The update of torch.optim.SGD, computed by ``csrc/cuda/sgd.cu``; the caller has checked the arguments."""

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
    if not params:
        return NotImplemented
    done = torch.ops.granet_cuda.try_masked_sgd_.default(
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
        lr_tensor,
        grad_scale,
        found_inf,
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

    One launch for all tensors. Hyperparameters on the device are read there, and nothing changes where
    ``found_inf`` is not zero. A gradient with other strides than its parameter's is copied first.
    """
    device = params[0].device
    dtypes = {params[0].dtype, *(speed.dtype for speed in momenta[:1] if momentum != 0)}
    computed = torch.float64 if torch.float64 in dtypes else torch.float32
    if lr_tensor is not None and lr_tensor.device != device:
        lr, lr_tensor = float(lr_tensor), None
    torch.ops.granet_cuda.masked_sgd_.default(
        params,
        [_in_order_of(param, grad) for param, grad in zip(params, grads, strict=True)],
        momenta,
        masks,
        lr,
        momentum,
        dampening,
        weight_decay,
        nesterov,
        maximize,
        first,
        _as(lr_tensor, device, computed),
        _as(grad_scale, device, computed),
        _as(found_inf, device, torch.float32),
        averages or [],
        average_decay,
    )


def _as(scalar: Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """In the dtype in which the kernel reads it; as a rule it is already."""
    return None if scalar is None else scalar.to(device, dtype)


def _in_order_of(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient with its elements in memory in the order of the parameter's, without gaps."""
    return grad if grad.stride() == param.stride() else aligned(grad, like=param).contiguous()
