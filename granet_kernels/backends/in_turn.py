"""A whole update by the two operators it is made of: what backends share that have no kernel for both.

A backend gives its own ``prune_`` and ``drop_regrow_``, and takes the operator as it is; a compiler is
given the public ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Tensors = list[Tensor]


def in_turn(
    prune_: Callable[[Tensors, Tensors, Tensor, Tensors], None],
    drop_regrow_: Callable[[Tensors, Tensors, Tensors, Tensor, Tensors], None],
) -> Callable[[Tensors, Tensors, Tensors, Tensor, Tensor, Tensors], Tensors]:
    """The operator ``prune_drop_regrow_`` of a backend that has these two."""

    def prune_drop_regrow_(
        weights: Tensors,
        masks: Tensors,
        scores: Tensors,
        k: Tensor,
        drop_fraction: Tensor,
        momenta: Tensors,
    ) -> Tensors:
        """Prune, then drop and regrow; the masks as they are in between are returned."""
        prune_(weights, masks, k, momenta)
        pruned = [torch.empty_like(mask) for mask in masks]
        torch._foreach_copy_(pruned, masks)  # a launch for many masks, not one for each
        drop_regrow_(weights, masks, scores, drop_fraction, momenta)
        return pruned

    return prune_drop_regrow_
