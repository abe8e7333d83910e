"""Choosing the largest fifth of all weights, and the published update that is made of it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.published import Edition, PublishedMasking, prune_bytes, update_bytes
from bench.registry import Case, Setting, Yardstick, register
from bench.resnet50 import kaiming_weights, weight_shapes
from bench.timing import copies_needed
from bench.yardsticks.step import make_sgd, make_tensors

KEEP = 0.2
# One update in the middle of a ramp: from here to there.
SPARSITY_BEFORE, SPARSITY_AFTER, DROP_FRACTION = 0.85, 0.9, 0.5

Select = Callable[[Tensor, int], object]
# Bytes of (n values, k chosen) that the call's own passes move; results are fp32 and int64.
Account = Callable[[int, int], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A way to choose, of values and k."""

    variant: str
    run: Select
    account: Account
    words: str
    """How the account comes about."""
    is_slow: bool = False
    """Only on one distribution."""


CALLS = (
    Call(
        variant="torch_sum",
        run=lambda x, k: x.sum(),
        account=lambda n, k: 4 * n,
        words="one read: the floor",
    ),
    Call(
        variant="torch_topk_sorted",
        run=lambda x, k: torch.topk(x, k, sorted=True),
        account=lambda n, k: 5 * 4 * n + 12 * k,
        words="5 reads + results",
    ),
    Call(
        variant="torch_topk_unsorted",
        run=lambda x, k: torch.topk(x, k, sorted=False),
        account=lambda n, k: 5 * 4 * n + 12 * k,
        words="5 reads + results",
    ),
    Call(
        variant="torch_kthvalue",
        run=lambda x, k: torch.kthvalue(x, x.numel() - k + 1),
        account=lambda n, k: 4 * n,
        words="1 read, at least",
        is_slow=True,
    ),
    Call(
        variant="torch_sort",
        run=lambda x, k: torch.sort(x),
        account=lambda n, k: 4 * n + 12 * n,
        words="1 read + results, at least",
        is_slow=True,
    ),
)


def kaiming_values(setting: Setting, generator: torch.Generator) -> Tensor:
    """A fresh network's."""
    weights = kaiming_weights(weight_shapes(setting.size), setting.device, setting.seed)
    return torch.cat([weight.abs().flatten() for weight in weights])


def normal_values(setting: Setting, generator: torch.Generator) -> Tensor:
    """Of one scale."""
    like = kaiming_values(setting, generator)
    return torch.randn(like.shape, device=like.device, generator=generator).abs()


def equal_values(setting: Setting, generator: torch.Generator) -> Tensor:
    """All are ties."""
    return torch.full_like(kaiming_values(setting, generator), 0.5)


def mostly_zero_values(setting: Setting, generator: torch.Generator) -> Tensor:
    """Of a network with 90 % sparsity: fewer are not zero than are chosen."""
    values = kaiming_values(setting, generator)
    drawn = torch.rand(values.shape, device=values.device, generator=generator)
    return values.masked_fill_(drawn < 0.9, 0.0)


def denormal_values(setting: Setting, generator: torch.Generator) -> Tensor:
    """Smaller than any normal fp32 number."""
    return normal_values(setting, generator).mul_(1e-39)


def one_exponent_values(setting: Setting, generator: torch.Generator) -> Tensor:
    """In [1, 2): the leading bits of all are the same."""
    like = kaiming_values(setting, generator)
    return torch.rand(like.shape, device=like.device, generator=generator).add_(1)


DISTRIBUTIONS: dict[str, Callable[[Setting, torch.Generator], Tensor]] = {
    "kaiming": kaiming_values,
    "normal": normal_values,
    "equal": equal_values,
    "mostly_zero": mostly_zero_values,
    "denormal": denormal_values,
    "one_exponent": one_exponent_values,
}


class Values:
    """Magnitudes of all weights in one tensor, and copies of it that calls take in turn."""

    def __init__(self, distribution: str, setting: Setting) -> None:
        generator = torch.Generator(setting.device).manual_seed(setting.seed)
        values = DISTRIBUTIONS[distribution](setting, generator)
        self.numel = values.numel()
        self.copies = copies_needed(values.nbytes, setting.cache_bytes)
        self._turn = itertools.cycle([values, *(values.clone() for _ in range(self.copies - 1))])

    def next(self) -> Tensor:
        return next(self._turn)


def build_select(call: Call, distribution: str, setting: Setting) -> Case:
    """The k largest of magnitudes concatenated beforehand."""
    values = Values(distribution, setting)
    k = int(values.numel * KEEP)
    return Case(
        run=lambda: call.run(values.next(), k),
        n_tensors=1,
        n_weights=values.numel,
        model_bytes=call.account(values.numel, k),
        account=call.words,
        copies=values.copies,
    )


def build_update(edition: Edition, whole: bool, setting: Setting) -> Case:
    """The published prune, or the whole published update, from the same state every time."""
    tensors = make_tensors("weights", SPARSITY_BEFORE, setting)
    optimizer = make_sgd(tensors.params, "foreach")
    optimizer.step()
    masking = PublishedMasking(tensors.weights, optimizer, tensors.masks, edition=edition)
    masking.apply_masks()
    saved = [
        (weight.detach().clone(), optimizer.state[weight]["momentum_buffer"].clone(), mask.clone())
        for weight, mask in zip(tensors.weights, masking.masks, strict=True)
    ]

    def reset() -> None:
        for index, (weight, (value, momentum, mask)) in enumerate(
            zip(tensors.weights, saved, strict=True)
        ):
            weight.data.copy_(value)
            optimizer.state[weight]["momentum_buffer"].copy_(momentum)
            masking.masks[index] = mask.clone()

    def run() -> None:
        if whole:
            masking.update(SPARSITY_AFTER, DROP_FRACTION)
        else:
            masking.prune(SPARSITY_AFTER)

    account = update_bytes if whole else prune_bytes
    return Case(
        run=run,
        n_tensors=len(tensors.weights),
        n_weights=tensors.numel,
        model_bytes=account(tensors.numel),
        account="table in bench/published.py",
        reset=reset,
    )


def _select_row(call: Call, distribution: str) -> Yardstick:
    return Yardstick(
        group="selection",
        name=f"select_{distribution}",
        variant=call.variant,
        build=functools.partial(build_select, call, distribution),
        baseline=f"select_{distribution}/torch_sum",
    )


register(
    *(
        _select_row(call, distribution)
        for distribution in DISTRIBUTIONS
        for call in CALLS
        if distribution == "kaiming" or not call.is_slow
    ),
    Yardstick(
        group="selection",
        name="prune",
        variant="published_cifar",
        build=functools.partial(build_update, "cifar", False),
        sparsity=SPARSITY_AFTER,
        baseline="select_kaiming/torch_sum",
    ),
    Yardstick(
        group="selection",
        name="update",
        variant="published_cifar",
        build=functools.partial(build_update, "cifar", True),
        sparsity=SPARSITY_AFTER,
        baseline="select_kaiming/torch_sum",
    ),
    Yardstick(
        group="selection",
        name="update",
        variant="published_imagenet",
        build=functools.partial(build_update, "imagenet", True),
        sparsity=SPARSITY_AFTER,
        baseline="select_kaiming/torch_sum",
    ),
)
