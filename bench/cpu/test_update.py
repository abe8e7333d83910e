"""A whole update (prune, drop, regrow) of ResNet-50's weights, against the published procedure."""

from __future__ import annotations

import pytest
import torch

from bench.cpu import verdict
from bench.cpu.race import Contender, Run, whole
from bench.cpu.targets import UPDATE
from bench.cpu.tensors import Tensors, make_tensors
from bench.published import Edition, PublishedMasking
from granet_kernels import prune_drop_regrow_
from granet_kernels.large_pages import gather_in_large_pages

# Three rounds: of one, ours took 35 ms in one run and 42 in the next.
SECONDS = 24.0
MEASURE = "update"
# One update in the middle of a ramp: from here to there, with the paper's drop fraction.
SPARSITY_BEFORE, SPARSITY_AFTER, DROP_FRACTION = 0.85, 0.9, 0.5
PUBLISHED, OURS = "published update", "prune_drop_regrow_"
EDITIONS: tuple[Edition, ...] = ("cifar", "imagenet")


def published(tensors: Tensors, edition: Edition) -> Run:
    """As released: float masks, sorts, a wait for every count."""
    params = tensors.parameters(masked=False)
    optimizer = torch.optim.SGD(params, lr=0.0, momentum=0.9, fused=True)
    optimizer.step()
    masking = PublishedMasking(params, optimizer, tensors.masks, edition=edition)
    floats = [mask.float() for mask in tensors.masks]
    momenta = tensors.momenta()

    def reset() -> None:
        masking.masks = [mask.clone() for mask in floats]
        for param, weight, momentum in zip(params, tensors.weights, momenta, strict=True):
            param.data.copy_(weight)
            optimizer.state[param]["momentum_buffer"].copy_(momentum)

    return whole(MEASURE, lambda: masking.update(SPARSITY_AFTER, DROP_FRACTION), reset)


def ours(tensors: Tensors) -> Run:
    """The operator of an engine's update, on weights and momentum as MaskedSGD keeps them.

    A floor is a selection more.
    """
    weights = [weight.clone() for weight in tensors.weights]
    saved_momenta = tensors.momenta()
    momenta = [momentum.clone() for momentum in saved_momenta]
    gather_in_large_pages([*weights, *momenta])
    saved = tensors.packed()
    masks = [mask.clone() for mask in saved]
    k = round(tensors.numel * (1 - SPARSITY_AFTER))

    def reset() -> None:
        torch._foreach_copy_(masks, saved)
        torch._foreach_copy_(weights, tensors.weights)
        torch._foreach_copy_(momenta, saved_momenta)

    def update() -> None:
        prune_drop_regrow_(weights, masks, tensors.grads, k, DROP_FRACTION, momenta=momenta)

    return whole(MEASURE, update, reset)


def test_update(threads, effort, race, ledger):
    tensors = make_tensors(SPARSITY_BEFORE, quick=effort.quick)
    contenders = [Contender(role=OURS, variant="", build=lambda: ours(tensors))]
    contenders += [
        Contender(
            role=f"{PUBLISHED}, {edition}",
            variant="",
            build=lambda edition=edition: published(tensors, edition),
        )
        for edition in EDITIONS
    ]
    done = race(contenders, SECONDS, least=1)
    for edition in EDITIONS:
        row = verdict.row(
            done,
            group="update",
            case=f"{SPARSITY_BEFORE:.0%} to {SPARSITY_AFTER:.0%} of {tensors.numel / 1e6:.1f} M",
            measure=MEASURE,
            threads=threads,
            sparsity=SPARSITY_AFTER,
            baseline=f"{PUBLISHED}, {edition}",
            ours=OURS,
            operator="prune_drop_regrow_",
            target=None if effort.quick else UPDATE,
        )
        ledger += [row] if row else []
    if reason := done.failure(OURS):
        pytest.fail(reason)
