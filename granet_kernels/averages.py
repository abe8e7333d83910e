"""Averages of an optimizer's parameters (EMA): who has which, and those that no kernel moves in its pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from granet_kernels.layout import is_dense
from granet_kernels.ops.checks import check_average, check_disjoint, fail


def averages_by_group(
    averages: Iterable[Tensor], groups: Sequence[dict[str, Any]]
) -> list[list[Tensor]]:
    """A list for each parameter group, of one average for each of its parameters.

    Args:
        averages: in the order of the groups, and of the parameters in each.
        groups: an optimizer's.

    Raises:
        ValueError: not as many as there are parameters, or one that is no tensor or does not fit.
    """
    remaining = list(averages)
    params = [param for group in groups for param in group["params"]]
    if len(remaining) != len(params):
        expected = f"{len(params)} tensors, one for each parameter of the optimizer"
        fail("averages", expected, len(remaining))
    check_fit(remaining, params)
    found = []
    for group in groups:
        count = len(group["params"])
        found.append(remaining[:count])
        remaining = remaining[count:]
    return found


def check_fit(averages: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """Whether each is like its parameter, without gaps in memory.

    Raises:
        ValueError: the first that is not.
    """
    for i, (average, param) in enumerate(zip(averages, params, strict=True)):
        name = f"averages[{i}]"
        if not isinstance(average, Tensor):
            fail(name, "a tensor", type(average).__name__)
        check_average(name, average, param, f"params[{i}]")
        if average.layout != torch.strided or not is_dense(average):
            fail(name, "a tensor without gaps in memory", _layout_of(average))


def _layout_of(tensor: Tensor) -> str:
    if tensor.layout != torch.strided:
        return str(tensor.layout)
    return f"shape {tuple(tensor.shape)} with strides {tensor.stride()}"


def check_apart(averages: Sequence[Sequence[Tensor]], others: Iterable[Tensor | None]) -> None:
    """Whether no average shares memory with another, or with any of the others.

    Raises:
        ValueError: one does.
    """
    reads = [tensor for tensor in others if tensor is not None and _has_memory(tensor)]
    written = [tensor for tensors in averages for tensor in tensors if _has_memory(tensor)]
    check_disjoint(reads, averages=written)


def _has_memory(tensor: Tensor) -> bool:
    """Of its own; those in shards (DTensor) and without data have none to look at."""
    return (
        tensor.layout == torch.strided
        and not tensor.is_meta
        and not is_traceable_wrapper_subclass(tensor)
    )


def check_complete(averages: Sequence[Sequence[Tensor]], groups: Sequence[dict[str, Any]]) -> None:
    """Whether there is still one for each parameter.

    Raises:
        ValueError: parameters or groups have come or gone.
    """
    sizes = [len(group["params"]) for group in groups]
    had = [len(tensors) for tensors in averages]
    if sizes != had:
        advice = "call average_into again after adding parameters"
        fail("averages", f"tensors for parameter groups of {sizes}", f"{had}: {advice}")


@torch.no_grad()
def move_averages(
    averages: list[Tensor], params: Sequence[Tensor], decay: float, found_inf: Tensor | None
) -> None:
    """average += (1 - decay) * (param - average), of torch's own.

    Where ``found_inf`` is not zero, which the device alone knows, averages keep their bits.
    """
    values = [param.to(avg.dtype) for param, avg in zip(params, averages, strict=True)]
    if found_inf is None:
        torch._foreach_lerp_(averages, values, 1 - decay)
        return
    moved = torch._foreach_lerp(averages, values, 1 - decay)
    for average, new in zip(averages, moved, strict=True):
        is_finite = (found_inf == 0).to(average.device, non_blocking=True).view(())
        average.copy_(torch.where(is_finite, new, average))
