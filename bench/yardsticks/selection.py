"""Choosing the largest fifth of all weights, and the published update that is made of it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

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

# name, call, bytes, how they come about
CALLS: tuple[tuple[str, Select, Account, str], ...] = (
    ("torch_sum", lambda x, k: x.sum(), lambda n, k: 4 * n, "one read: the floor"),
    (
        "torch_topk_sorted",
        lambda x, k: torch.topk(x, k, sorted=True),
        lambda n, k: 5 * 4 * n + 12 * k,
        "5 reads + results",
    ),
    (
        "torch_topk_unsorted",
        lambda x, k: torch.topk(x, k, sorted=False),
        lambda n, k: 5 * 4 * n + 12 * k,
        "5 reads + results",
    ),
    (
        "torch_kthvalue",
        lambda x, k: torch.kthvalue(x, x.numel() - k + 1),
        lambda n, k: 4 * n,
        "1 read, at least",
    ),
    (
        "torch_sort",
        lambda x, k: torch.sort(x),
        lambda n, k: 4 * n + 12 * n,
        "1 read + results, at least",
    ),
)


def build_select(select: Select, account: Account, words: str, setting: Setting) -> Case:
    """The k largest magnitudes of a fresh network, concatenated beforehand."""
    weights = kaiming_weights(weight_shapes(setting.size), setting.device, setting.seed)
    values = torch.cat([weight.abs().flatten() for weight in weights])
    numel, k = values.numel(), int(values.numel() * KEEP)
    copies = copies_needed(values.nbytes, setting.cache_bytes)
    turn = itertools.cycle([values, *(values.clone() for _ in range(copies - 1))])
    return Case(
        run=lambda: select(next(turn), k),
        n_tensors=1,
        n_weights=numel,
        model_bytes=account(numel, k),
        account=words,
        copies=copies,
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


register(
    *(
        Yardstick(
            group="selection",
            name="select",
            variant=variant,
            build=functools.partial(build_select, call, account, words),
            baseline="select/torch_sum",
        )
        for variant, call, account, words in CALLS
    ),
    Yardstick(
        group="selection",
        name="prune",
        variant="published_cifar",
        build=functools.partial(build_update, "cifar", False),
        sparsity=SPARSITY_AFTER,
        baseline="select/torch_sum",
    ),
    Yardstick(
        group="selection",
        name="update",
        variant="published_cifar",
        build=functools.partial(build_update, "cifar", True),
        sparsity=SPARSITY_AFTER,
        baseline="select/torch_sum",
    ),
    Yardstick(
        group="selection",
        name="update",
        variant="published_imagenet",
        build=functools.partial(build_update, "imagenet", True),
        sparsity=SPARSITY_AFTER,
        baseline="select/torch_sum",
    ),
)
