"""The update of torch.optim.SGD on active weights, all tensors in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from granet_kernels.backends.triton.accounts import group_bytes, in_groups, in_sectors
from granet_kernels.backends.triton.groups import elements, is_active, repeated
from granet_kernels.backends.triton.launch import (
    DTYPES,
    GROUP,
    computed_in,
    converted,
    jit,
    launch,
    scalar,
    scalar_argument,
)
from granet_kernels.backends.triton.table import Table, address, locate
from granet_kernels.layout import aligned

GROUPS = 256  # mask bytes of a chunk: two for each thread, so that enough loads are under way
WARPS = 4


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
    """g = ±grad / grad_scale + λw;  v = μv + (1 - dampening) g;  w = w - lr (g + μv  or  v).

    On the ``first`` step v = g. Rounded once, when w and v are stored; then, with averages,
    a = a + (1 - average_decay)(w - a). Inactive weights, momenta and averages keep their bits, and so
    does everything where ``found_inf`` is not zero. Scalars that are tensors on the device are read
    there. A gradient with other strides than its parameter is copied first.
    """
    device, dtype = params[0].device, params[0].dtype
    if found_inf is not None and found_inf.device != device:
        if float(found_inf) != 0:
            return
        found_inf = None
    grads = [_in_order_of(param, grad) for param, grad in zip(params, grads, strict=True)]
    lists = [params, grads, masks]
    lists += [momenta] if momentum != 0 else []
    lists += [averages] if averages else []
    share = 1 - average_decay if averages else None
    average_dtype = torch.promote_types(dtype, torch.float32)
    speed_dtype = momenta[0].dtype if momentum != 0 else dtype
    widest = torch.promote_types(dtype, speed_dtype)
    gain = None if first or momentum == 0 else 1 - dampening
    table = Table.of(lists, GROUPS * GROUP.value)
    launch(
        _masked_sgd_kernel,
        table.chunks,
        table.rows,
        table.owners,
        scalar_argument(lr if lr_tensor is None else lr_tensor, widest, device),
        scalar_argument(momentum or None, widest, device),
        scalar_argument(gain, widest, device),
        scalar_argument(weight_decay or None, widest, device),
        scalar_argument(grad_scale, widest, device),
        scalar_argument(share, average_dtype, device),
        found_inf,
        WIDTH=table.width,
        PARAM=DTYPES[dtype],
        SPEED=DTYPES[speed_dtype],
        NESTEROV=nesterov,
        MAXIMIZE=maximize,
        ALIGNED=table.aligned,
        GROUPS=GROUPS,
        num_warps=WARPS,
    )


def masked_sgd_bytes(
    params: Sequence[Tensor],
    momenta: Sequence[Tensor],
    masks: Sequence[Tensor],
    averages: Sequence[Tensor] = (),
) -> int:
    """Groups with an active weight: all that there is of it is read, and written but for the gradient."""
    total = 0
    for i, (param, mask) in enumerate(zip(params, masks, strict=True)):
        touched = group_bytes(param, mask) != 0
        total += in_sectors(touched.numel()) + 3 * in_groups(touched, param.element_size())
        for companion in (*momenta[i : i + 1], *averages[i : i + 1]):
            total += 2 * in_groups(touched, companion.element_size())
    return total


def _in_order_of(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient with its elements in memory in the order of the parameter's, without gaps."""
    return grad if grad.stride() == param.stride() else aligned(grad, like=param).contiguous()


@jit(
    do_not_specialize=(
        "lr",
        "momentum",
        "gain",
        "weight_decay",
        "grad_scale",
        "share",
        "found_inf",
    )
)
def _masked_sgd_kernel(
    rows,
    owners,
    lr,
    momentum,
    gain,
    weight_decay,
    grad_scale,
    share,
    found_inf,
    WIDTH: tl.constexpr,
    PARAM: tl.constexpr,
    SPEED: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """A chunk of ``GROUPS`` groups; what is None is left out, averages with their ``share`` of the weight."""
    if found_inf is not None and tl.load(found_inf) != 0:
        return
    row, start, numel = locate(rows, owners, WIDTH, GROUPS * GROUP)
    left = numel - start
    param = address(row, 0, PARAM, ALIGNED) + start
    grad = address(row, 1, PARAM, ALIGNED) + start
    mask = address(row, 2, tl.uint8, ALIGNED) + start // GROUP
    speed = param
    if momentum is not None:
        speed = address(row, 3, SPEED, ALIGNED) + start
    average = param
    if share is not None:
        LIST: tl.constexpr = 3 if momentum is None else 4
        average = address(row, LIST, computed_in(PARAM), ALIGNED) + start

    group = tl.arange(0, GROUPS)
    byte = repeated(tl.load(mask + group, mask=(group + 1) * GROUP <= left, other=0))
    _update(
        param + elements(group),
        grad + elements(group),
        speed + elements(group),
        average + elements(group),
        is_active(byte),
        byte != 0,
        lr,
        momentum,
        gain,
        weight_decay,
        grad_scale,
        share,
        NESTEROV,
        MAXIMIZE,
    )
    whole = left // GROUP
    if (whole < GROUPS) & (whole * GROUP < left):  # an incomplete group ends the tensor
        element = whole * GROUP + tl.arange(0, GROUP)
        active = (tl.load(mask + whole) >> tl.arange(0, GROUP) & 1) != 0
        _update(
            param + element,
            grad + element,
            speed + element,
            average + element,
            active,
            active,
            lr,
            momentum,
            gain,
            weight_decay,
            grad_scale,
            share,
            NESTEROV,
            MAXIMIZE,
        )


@jit
def _update(
    param_ptr,
    grad_ptr,
    speed_ptr,
    average_ptr,
    active,
    touched,
    lr,
    momentum,
    gain,
    weight_decay,
    grad_scale,
    share,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
):
    """Elements that are ``touched`` are read and written; those that are not ``active`` keep their bits."""
    PARAM: tl.constexpr = param_ptr.dtype.element_ty
    SPEED: tl.constexpr = speed_ptr.dtype.element_ty
    OF_PARAM: tl.constexpr = computed_in(PARAM)
    OF_SPEED: tl.constexpr = computed_in(SPEED)
    OF_BOTH: tl.constexpr = computed_in(PARAM, SPEED)

    old = tl.load(param_ptr, mask=touched, other=0)
    weight = old.to(OF_PARAM)
    step = tl.load(grad_ptr, mask=touched, other=0).to(OF_PARAM)
    if share is not None:  # before anything is stored: what is loaded after that waits for it
        old_average = tl.load(average_ptr, mask=touched, other=0)
    if grad_scale is not None:
        # Dividing each gradient exactly would be a call for each, and registers spilled for it. The
        # factor is exact where the scale is a power of two, as a GradScaler's is.
        step *= reciprocal(scalar(grad_scale, OF_PARAM))
    if MAXIMIZE:
        step = -step
    if weight_decay is not None:
        step = tl.fma(weight, scalar(weight_decay, OF_PARAM), step)
    step = step.to(OF_BOTH)
    if momentum is not None:
        old_speed = tl.load(speed_ptr, mask=touched, other=0)
        velocity = step
        if gain is not None:
            kept = (old_speed.to(OF_SPEED) * scalar(momentum, OF_SPEED)).to(OF_BOTH)
            velocity = tl.fma(step, scalar(gain, OF_BOTH), kept)
        tl.store(speed_ptr, tl.where(active, converted(velocity, SPEED), old_speed), mask=touched)
        step = tl.fma(velocity, scalar(momentum, OF_BOTH), step) if NESTEROV else velocity
    weight = tl.fma(step, -scalar(lr, OF_BOTH), weight.to(OF_BOTH))
    stored = converted(weight, PARAM)
    tl.store(param_ptr, tl.where(active, stored, old), mask=touched)
    if share is not None:
        moved = lerp(old_average, stored.to(OF_PARAM), scalar(share, OF_PARAM))
        tl.store(average_ptr, tl.where(active, moved, old_average), mask=touched)


@jit
def lerp(average, weight, share):
    """average + share * (weight - average), as torch.lerp computes it: from the nearer end.

    So with a share of 1 it is the weight, and with 0 the average.
    """
    from_average = share < 0.5
    factor = tl.where(from_average, share, share - 1)
    return tl.fma(weight - average, factor, tl.where(from_average, average, weight))


@jit
def reciprocal(x):
    """1 / x, rounded correctly."""
    one = tl.full([], 1, x.dtype)
    return tl.div_rn(one, x) if x.dtype == tl.float32 else one / x
