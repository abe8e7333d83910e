"""Averages of an optimizer's parameters (EMA): who has which, and those that no kernel moves in its pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from granet_kernels.ops.checks import check_average, fail


def averages_by_group(
    averages: Iterable[Tensor], groups: Sequence[dict[str, Any]]
) -> list[list[Tensor]]:
    """A list for each parameter group, of one average for each of its parameters.

    Args:
        averages: in the order of the groups, and of the parameters in each.
        groups: an optimizer's.

    Raises:
        ValueError: not as many as there are parameters, or one that does not fit.
    """
    remaining = list(averages)
    params = [param for group in groups for param in group["params"]]
    if len(remaining) != len(params):
        expected = f"{len(params)} tensors, one for each parameter of the optimizer"
        fail("averages", expected, len(remaining))
    for i, (average, param) in enumerate(zip(remaining, params, strict=True)):
        if average is param:
            fail(f"averages[{i}]", f"a copy of params[{i}]", "the parameter itself")
        check_average(f"averages[{i}]", average, param, f"params[{i}]")
    found = []
    for group in groups:
        count = len(group["params"])
        found.append(remaining[:count])
        remaining = remaining[count:]
    return found


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
