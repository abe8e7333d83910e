"""The update of torch.optim.SGD on active weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from granet_kernels.backends.reference.mask import active


def masked_sgd_(
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
    """g = ±grad / grad_scale + λw;  v = μv + (1 - dampening) g;  w = w - lr (g + μv  or  v).

    On the ``first`` step v = g. Everything is computed in fp32 (fp64 for fp64 parameters) and
    rounded once, when w and v are stored. Then, with averages, a = a + (1 - average_decay)(w - a), w
    as it was stored. Inactive weights, momenta and averages keep their bits, and so does everything
    where ``found_inf`` is not zero.
    """
    rate = float(lr if lr_tensor is None else lr_tensor)
    for i, (param, grad, mask) in enumerate(zip(params, grads, masks, strict=True)):
        written = active(mask, param)
        if found_inf is not None:
            written = written & (found_inf == 0)
        weight, step = in_compute_dtype(param), in_compute_dtype(grad)
        if grad_scale is not None:
            step = step / grad_scale
        if maximize:
            step = -step
        if weight_decay != 0:
            step = step.add(weight, alpha=weight_decay)
        if momentum != 0:
            velocity = step.to(torch.promote_types(step.dtype, momenta[i].dtype))
            if not first:
                velocity = in_compute_dtype(momenta[i]).mul(momentum).add(step, alpha=1 - dampening)
            store(momenta[i], velocity, written)
            step = step.add(velocity, alpha=momentum) if nesterov else velocity
        store(param, weight.add(step, alpha=-rate), written)
        if averages:
            stored = in_compute_dtype(param)
            store(averages[i], averages[i].lerp(stored, 1 - average_decay), written)


def in_compute_dtype(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def store(target: Tensor, value: Tensor, written: Tensor) -> None:
    """Round to the target's dtype where ``written``; keep the target's bits elsewhere."""
    target.copy_(torch.where(written, value.to(target.dtype), target))
