"""Ways to find the k largest of many magnitudes; torch.sum is one streaming read, the floor."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bench.cpu.race import Contender, Run, whole
from bench.cpu.tensors import Tensors
from granet_kernels import prune_

MEASURE = "select"
READ = "torch.sum"
MASK, PRUNE, PRUNE_MOMENTUM = "topk_mask, packed", "prune_", "prune_ with momentum"


def _partition(values: Tensor, k: int, dtype: type[np.generic]) -> object:
    """Magnitudes order the same way as their bits, and integers compare faster."""
    return np.partition(values.numpy().view(dtype), values.numel() - k)


FINDERS: dict[str, Callable[[Tensor, int], object]] = {
    READ: lambda x, k: x.sum(),
    "torch.topk": lambda x, k: torch.topk(x, k, sorted=False),
    "torch.topk sorted": lambda x, k: torch.topk(x, k, sorted=True),
    "torch.kthvalue": lambda x, k: torch.kthvalue(x, x.numel() - k + 1),
    "np.partition": lambda x, k: _partition(x, k, np.float32),
    "np.partition of int32": lambda x, k: _partition(x, k, np.int32),
}


def finders(tensors: Tensors, k: int) -> list[Contender]:
    """Each on all magnitudes in one tensor, concatenated beforehand."""
    values = torch.cat([weight.abs().flatten() for weight in tensors.weights])
    return [
        Contender(
            role=name, variant="", build=lambda find=find: whole(MEASURE, lambda: find(values, k))
        )
        for name, find in FINDERS.items()
    ]


def ours(tensors: Tensors, k: int) -> list[Contender]:
    """The packed masks alone; pruning in place, of weights and of their momentum as well."""
    return [
        Contender(role=MASK, variant="", build=lambda: _mask(tensors, k)),
        Contender(role=PRUNE, variant="", build=lambda: _prune(tensors, k, momentum=False)),
        Contender(role=PRUNE_MOMENTUM, variant="", build=lambda: _prune(tensors, k, momentum=True)),
    ]


def _mask(tensors: Tensors, k: int) -> Run:
    magnitudes = [weight.abs() for weight in tensors.weights]
    count = torch.tensor([k])
    return whole(MEASURE, lambda: torch.ops.granet.topk_mask(magnitudes, count))


def _prune(tensors: Tensors, k: int, *, momentum: bool) -> Run:
    weights = [weight.clone() for weight in tensors.weights]
    momenta = [grad.clone() for grad in tensors.grads] if momentum else []
    saved = tensors.packed()
    masks = [mask.clone() for mask in saved]

    def reset() -> None:
        torch._foreach_copy_(masks, saved)
        torch._foreach_copy_(weights, tensors.weights)
        if momenta:
            torch._foreach_copy_(momenta, tensors.grads)

    return whole(MEASURE, lambda: prune_(weights, masks, k, momenta=momenta or None), reset)
