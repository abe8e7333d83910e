"""Selection: pruning to a count, dropping and regrowing, both at once, and the top-k mask of scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from granet_kernels.backends.composed import in_turn
from granet_kernels.layout import packed_length
from granet_kernels.ops.checks import (
    check_count,
    check_device,
    check_disjoint,
    check_floating,
    check_lengths,
    check_like,
    check_masked,
    check_momenta,
    check_not_empty,
    check_scalar,
    check_written,
    describe,
    fail,
)
from granet_kernels.ops.define import compile_as, define


def check_prune(
    weights: Sequence[Tensor], masks: Sequence[Tensor], k: Tensor, momenta: Sequence[Tensor]
) -> None:
    check_selected(weights, masks, momenta)
    check_count("k", k, weights, "weights")


define(
    "prune_",
    "(Tensor(a!)[] weights, Tensor(b!)[] masks, Tensor k, Tensor(c!)[] momenta) -> ()",
    check=check_prune,
    check_data=lambda weights, masks, k, momenta: check_disjoint(
        weights=weights, masks=masks, momenta=momenta
    ),
)


def check_pruned_masks(weights: Sequence[Tensor], masks: Sequence[Tensor], k: Tensor) -> None:
    check_prune(weights, masks, k, [])


define(
    "pruned_masks",
    "(Tensor[] weights, Tensor[] masks, Tensor k) -> Tensor[]",
    check=check_pruned_masks,
    fake=lambda weights, masks, k: [torch.empty_like(mask) for mask in masks],
)


def check_drop_regrow(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    scores: Sequence[Tensor],
    drop_fraction: Tensor,
    momenta: Sequence[Tensor],
) -> None:
    check_selected(weights, masks, momenta)
    check_exchange(weights, scores, drop_fraction)


define(
    "drop_regrow_",
    "(Tensor(a!)[] weights, Tensor(b!)[] masks, Tensor[] scores, Tensor drop_fraction, "
    "Tensor(c!)[] momenta) -> ()",
    check=check_drop_regrow,
    check_data=lambda weights, masks, scores, drop_fraction, momenta: check_disjoint(
        reads=scores, weights=weights, masks=masks, momenta=momenta
    ),
)


def check_prune_drop_regrow(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    scores: Sequence[Tensor],
    k: Tensor,
    drop_fraction: Tensor,
    momenta: Sequence[Tensor],
) -> None:
    check_selected(weights, masks, momenta)
    check_count("k", k, weights, "weights")
    check_exchange(weights, scores, drop_fraction)


define(
    "prune_drop_regrow_",
    "(Tensor(a!)[] weights, Tensor(b!)[] masks, Tensor[] scores, Tensor k, Tensor drop_fraction, "
    "Tensor(c!)[] momenta) -> Tensor[]",
    check=check_prune_drop_regrow,
    check_data=lambda weights, masks, scores, k, drop_fraction, momenta: check_disjoint(
        reads=scores, weights=weights, masks=masks, momenta=momenta
    ),
    fake=lambda weights, masks, scores, k, drop_fraction, momenta: [
        torch.empty_like(mask) for mask in masks
    ],
)
compile_as("prune_drop_regrow_", in_turn(torch.ops.granet.prune_, torch.ops.granet.drop_regrow_))


def check_selected(
    weights: Sequence[Tensor], masks: Sequence[Tensor], momenta: Sequence[Tensor]
) -> None:
    """What is selected from and written in place."""
    check_masked("weights", weights, masks)
    check_momenta(momenta, weights, "weights")


def check_exchange(
    weights: Sequence[Tensor], scores: Sequence[Tensor], drop_fraction: Tensor
) -> None:
    """What decides who grows, and how many are dropped."""
    check_lengths(weights=weights, scores=scores)
    for i, (score, weight) in enumerate(zip(scores, weights, strict=True)):
        check_floating(f"scores[{i}]", score)
        check_like(f"scores[{i}]", score, weight, f"weights[{i}]")
    check_scalar("drop_fraction", drop_fraction, weights[0])
    if drop_fraction.dtype != torch.float64:
        fail("drop_fraction", "a float64 tensor of one element", describe(drop_fraction))


def check_topk_mask(scores: Sequence[Tensor], k: Tensor) -> None:
    check_not_empty("scores", scores)
    for i, score in enumerate(scores):
        check_written(f"scores[{i}]", score)
        check_device(f"scores[{i}]", score, scores[0], "scores[0]")
    check_count("k", k, scores, "scores")


define(
    "topk_mask",
    "(Tensor[] scores, Tensor k) -> Tensor[]",
    check=check_topk_mask,
    fake=lambda scores, k: [
        score.new_empty(packed_length(score.numel()), dtype=torch.uint8) for score in scores
    ],
)
