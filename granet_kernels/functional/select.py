"""Selecting weights: pruning, regrowth, a whole update, and the same selection as a function of scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

import granet_kernels.ops  # noqa: F401 - registers the operators
from granet_kernels.functional.arguments import counts_of, fraction_of, tensor_list
from granet_kernels.functional.mask import unpack_mask

_ops = torch.ops.granet


@torch.no_grad()
def prune_(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    k: int | Sequence[int] | Tensor,
    *,
    momenta: Sequence[Tensor] | None = None,
) -> None:
    """Keep the ``k`` active weights of largest magnitude; zero the others and their momentum.

    Exactly ``k`` stay; where fewer are active, all of them do. Equal magnitudes: the lower (tensor,
    element) index stays. NaN ranks as the largest magnitude. Weights that were inactive before are
    not touched: they are +0.0 (:func:`zero_inactive_` makes them so).

    Args:
        weights: fp32, bf16, fp16 or fp64, dense in memory, all on one device.
        masks: their packed masks.
        k: how many stay over all tensors together, or a list with a count for each tensor. A tensor
            (int64, of 1 or ``len(weights)`` elements) is not read on the host, so that the call can
            be captured in a CUDA graph and its count changed between replays.
        momenta: one for each weight, of its memory layout.

    Raises:
        TypeError: one tensor where a sequence is expected.
        ValueError: a shape, dtype, device or memory layout that does not fit, tensors that share memory,
            or a count out of range. Nothing has been changed then.

    Source: the paper's gradual magnitude pruning, section 4.1 and Algorithm 1.
    """
    weights = tensor_list("weights", weights)
    if weights:
        counts = counts_of(k, [weight.numel() for weight in weights], weights[0].device)
        _ops.prune_(weights, tensor_list("masks", masks), counts, tensor_list("momenta", momenta))


@torch.no_grad()
def pruned_masks(
    weights: Sequence[Tensor], masks: Sequence[Tensor], k: int | Sequence[int] | Tensor
) -> list[Tensor]:
    """The packed masks that :func:`prune_` would leave, new tensors; nothing else is written.

    Args:
        weights, masks, k: as in :func:`prune_`. What is ranked may be any score: its magnitude counts.

    Raises:
        TypeError, ValueError: as :func:`prune_`.
    """
    weights = tensor_list("weights", weights)
    if not weights:
        return []
    counts = counts_of(k, [weight.numel() for weight in weights], weights[0].device)
    return cast(list[Tensor], _ops.pruned_masks(weights, tensor_list("masks", masks), counts))


@torch.no_grad()
def drop_regrow_(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    scores: Sequence[Tensor],
    drop_fraction: float | Tensor,
    *,
    momenta: Sequence[Tensor] | None = None,
) -> None:
    """In each tensor drop the smallest active weights and regrow as many inactive ones (in place).

    Drops ``ceil(drop_fraction * active)`` weights of smallest magnitude and regrows as many by the
    largest ``|score|`` among all that are then inactive, the just-dropped included: those keep
    value and momentum, the others start from +0.0, whatever was in their place. Weights that stay
    inactive are not touched. Ties and NaN weights as in :func:`prune_`; NaN scores rank last.

    Args:
        weights, masks, momenta: as in :func:`prune_`.
        scores: one for each weight, its shape, any strides: the dense gradients, as they are.
        drop_fraction: in [0, 1]. A float64 tensor of one element is not read on the host.

    Raises:
        TypeError, ValueError: as :func:`prune_`, and for a fraction out of range.

    Source: the paper's zero-cost neuroregeneration, section 4.2 and Algorithm 1.
    """
    weights, fraction = tensor_list("weights", weights), fraction_of(drop_fraction)
    if weights:
        _ops.drop_regrow_(
            weights,
            tensor_list("masks", masks),
            tensor_list("scores", scores),
            fraction,
            tensor_list("momenta", momenta),
        )


@torch.no_grad()
def prune_drop_regrow_(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    scores: Sequence[Tensor],
    k: int | Sequence[int] | Tensor,
    drop_fraction: float | Tensor,
    *,
    momenta: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """A whole update: :func:`prune_`, then :func:`drop_regrow_` (in place), in one call.

    The results are those of the two calls, bit for bit; a backend may read the weights fewer times for them.

    Args:
        weights, masks, momenta: as in :func:`prune_`.
        scores: as in :func:`drop_regrow_`.
        k: how many pruning leaves, as in :func:`prune_`.
        drop_fraction: of those that pruning left in each tensor, as in :func:`drop_regrow_`.

    Returns:
        The packed masks as pruning left them, new tensors: what ``masks`` would have held between the
        two calls. With ``masks`` they tell what was pruned, what was dropped and what regrew.

    Raises:
        TypeError, ValueError: as :func:`prune_` and :func:`drop_regrow_`. Nothing has been changed then.

    Source: one update of the paper's Algorithm 1: sections 4.1 and 4.2.
    """
    weights, fraction = tensor_list("weights", weights), fraction_of(drop_fraction)
    if not weights:
        return []
    counts = counts_of(k, [weight.numel() for weight in weights], weights[0].device)
    pruned = _ops.prune_drop_regrow_(
        weights,
        tensor_list("masks", masks),
        tensor_list("scores", scores),
        counts,
        fraction,
        tensor_list("momenta", momenta),
    )
    return cast(list[Tensor], pruned)


def topk_mask(scores: Sequence[Tensor], k: int | Sequence[int] | Tensor) -> list[Tensor]:
    """1.0 at the ``k`` largest scores, 0.0 elsewhere, with a straight-through gradient.

    Args:
        scores: floating, any layout; ranked by value (pass ``s.abs()`` for magnitudes), NaN last.
        k: over all tensors together, or one count for each, as in :func:`prune_`.

    Returns:
        Masks of the scores' shapes and dtypes. The gradient of a mask is handed to its scores
        unchanged (straight-through estimator, Bengio et al. 2013).

    Raises:
        TypeError: one tensor where a sequence is expected.
        ValueError: a dtype or device that does not fit, or a count out of range.
    """
    scores = tensor_list("scores", scores)
    if not scores:
        return []
    counts = counts_of(k, [score.numel() for score in scores], scores[0].device)
    return list(TopkMaskFunction.apply(counts, *scores))


class TopkMaskFunction(torch.autograd.Function):
    """Forward: the selection. Backward: the identity."""

    @staticmethod
    def forward(counts: Tensor, *scores: Tensor) -> tuple[Tensor, ...]:
        rows = [score.contiguous() for score in scores]
        packed = _ops.topk_mask(rows, counts)
        return tuple(
            unpack_mask(mask, score.shape).to(score.dtype)
            for mask, score in zip(packed, rows, strict=True)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *grads)
