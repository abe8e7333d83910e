"""Selection by other operators of the same backend: what backends share that have no kernel for it.

A backend gives its own ``prune_`` and ``drop_regrow_``, and takes the operators as they are; a compiler is
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
        pruned = _copies(masks)
        drop_regrow_(weights, masks, scores, drop_fraction, momenta)
        return pruned

    return prune_drop_regrow_


def on_copies(
    prune_: Callable[[Tensors, Tensors, Tensor, Tensors], None],
) -> Callable[[Tensors, Tensors, Tensor], Tensors]:
    """The operator ``pruned_masks`` of a backend that has this one."""

    def pruned_masks(weights: Tensors, masks: Tensors, k: Tensor) -> Tensors:
        """What pruning leaves of the masks; weights and masks are copied, to be pruned."""
        pruned = _copies(masks)
        prune_(_copies(weights), pruned, k, [])
        return pruned

    return pruned_masks


def _copies(tensors: Tensors) -> Tensors:
    copies = [torch.empty_like(tensor) for tensor in tensors]
    if copies:  # a launch for many, not one for each
        torch._foreach_copy_(copies, [tensor.detach() for tensor in tensors])
    return copies
