"""GraNet's published masking and update (Liu et al., NeurIPS 2021), as a baseline.

Written anew from a description of what the authors' code computes and how: float32 masks;
weight and momentum reallocated at every step; global pruning by a sorted top-k over concatenated
magnitudes, with autograd recording; dropping and regrowing by full sorts, layer by layer, with a
host synchronisation for every count. It is slow on purpose in the same places; nothing but the
benchmarks and their test uses it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Edition = Literal["cifar", "imagenet"]

# Bytes a weight (fp32) that the calls below move when every call reads each operand once and
# writes each result once. Sorting counts as one read of the keys and one write of sorted keys and
# int64 indices, though a radix sort makes several passes: the account is a lower bound.
STEP_BYTES = {
    "weight * mask": 4 + 4 + 4,
    "momentum * mask": 4 + 4 + 4,
}
PRUNE_BYTES = {
    "abs": 4 + 4,
    "cat": 4 + 4,
    "topk, five reads": 5 * 4,
    "abs again": 4 + 4,
    "compare": 4 + 1,
    "bool to float": 1 + 4,
    "mask weight and momentum": sum(STEP_BYTES.values()),
    "count": 4,
}
DROP_REGROW_BYTES = {
    "count before": 4,
    "float to uint8": 4 + 1,
    "abs": 4 + 4,
    "sort magnitudes": 4 + 4 + 8,
    "compare or scatter": 1 + 4,
    "count after": 1,
    "clone gradient": 4 + 4,
    "gradient where inactive": 1 + 4 + 4 + 4 + 4,
    "abs of it": 4 + 4,
    "sort scores": 4 + 4 + 8,
    "uint8 to float": 1 + 4,
}


def step_bytes(weights: int) -> int:
    """Model bytes of `apply_masks`."""
    return weights * sum(STEP_BYTES.values())


def prune_bytes(weights: int) -> int:
    """Model bytes of `prune`."""
    return weights * sum(PRUNE_BYTES.values())


def update_bytes(weights: int) -> int:
    """Model bytes of `update`."""
    return prune_bytes(weights) + weights * sum(DROP_REGROW_BYTES.values()) + step_bytes(weights)


class PublishedMasking:
    """Masks for `params` (fp32, updated by `optimizer`), treated as the published code treats them.

    `edition` is which of its two code bases: "cifar" keeps magnitudes strictly above the
    threshold and drops by threshold; "imagenet" keeps those equal to it and drops by sorted index.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        masks: Sequence[Tensor],
        *,
        edition: Edition = "cifar",
    ) -> None:
        if len(params) != len(masks):
            raise ValueError(f"masks: expected {len(params)}, one a parameter, got {len(masks)}")
        if edition not in ("cifar", "imagenet"):
            raise ValueError(f"edition: expected 'cifar' or 'imagenet', got {edition!r}")
        self.params = list(params)
        self.optimizer = optimizer
        self.masks = [mask.float() for mask in masks]
        self.edition = edition

    def apply_masks(self) -> None:
        """After every optimizer step: new storage for each weight and each momentum buffer."""
        for param, mask in zip(self.params, self.masks, strict=True):
            param.data = param.data * mask
            state = self.optimizer.state[param]
            if state.get("momentum_buffer") is not None:
                state["momentum_buffer"] = state["momentum_buffer"] * mask

    def prune(self, sparsity: float) -> None:
        """Global magnitude pruning to `sparsity`; never fewer zeros than before."""
        magnitudes = torch.cat([param.abs().flatten() for param in self.params])
        k = int(magnitudes.numel() * (1 - sparsity))
        if k < 1:
            raise ValueError(f"sparsity: expected to leave at least one weight, got {sparsity}")
        threshold = torch.topk(magnitudes, k, sorted=True).values[-1]
        for index, param in enumerate(self.params):
            kept = param.abs() > threshold if self.edition == "cifar" else param.abs() >= threshold
            self.masks[index] = kept.float()
        self.apply_masks()
        self.active_counts()

    def active_counts(self) -> list[int]:
        """Active weights of each layer; the published code logs them, one synchronisation each."""
        return [int(mask.sum().item()) for mask in self.masks]

    def drop_and_regrow(self, drop_fraction: float) -> None:
        """Per layer: drop `ceil(drop_fraction * active)`, then regrow what was dropped by |grad|.

        The just-dropped may return, and do so with their old value and momentum, because masks
        are applied only at the end of the update.
        """
        before = self.active_counts()
        kept = [
            self._drop(param, mask, active, drop_fraction)
            for param, mask, active in zip(self.params, self.masks, before, strict=True)
        ]
        for index, (param, mask, active) in enumerate(zip(self.params, kept, before, strict=True)):
            self.masks[index] = _regrow(param, mask, active - int(mask.sum().item()))

    def _drop(self, param: Tensor, mask: Tensor, active: int, drop_fraction: float) -> Tensor:
        """uint8 mask without the smallest magnitudes; the inactive count among the smallest."""
        kept = mask.byte()
        k = mask.numel() - active + math.ceil(drop_fraction * active)
        if k == 0:
            return kept
        magnitudes = param.data.abs()
        values, order = torch.sort(magnitudes.flatten())
        if self.edition == "cifar":
            return (magnitudes > values[k - 1].item()).byte()
        kept.view(-1)[order[:k]] = 0
        return kept

    def update(self, sparsity: float, drop_fraction: float) -> None:
        """One update: prune, drop, regrow, then apply the masks. Needs `.grad` of every weight."""
        self.prune(sparsity)
        self.drop_and_regrow(drop_fraction)
        self.apply_masks()


def _regrow(param: nn.Parameter, mask: Tensor, count: int) -> Tensor:
    """Float mask with `count` more entries: the largest |grad| where `mask` is 0.

    Fewer than `count` non-zero gradients there: the rest of the choice falls on zero scores, which
    active weights have too, and the layer loses density, as in the published code.
    """
    if param.grad is None:
        raise ValueError("params: expected every one to have a gradient, got one without")
    scores = (param.grad.clone() * (mask == 0).float()).abs()
    order = torch.sort(scores.flatten(), descending=True).indices
    grown = mask.clone()
    grown.view(-1)[order[:count]] = 1
    return grown.float()
