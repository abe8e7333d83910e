"""SNIP."""

from __future__ import annotations

import torch
from torch import Tensor

from granet.at_start import AtStart, Loss


class SNIP(AtStart):
    """Single-shot pruning before training: keep the weights to which the loss is most sensitive.

    The score of a weight is ``|weight * gradient|``, of the first batches (Eq. 5).

    Args: as in :class:`granet.at_start.AtStart`.
    """

    name = "snip"
    source = "Lee et al., ICLR 2019, arXiv 1810.02340"

    def select(self, batches: list[tuple[Tensor, Tensor]], loss: Loss) -> None:
        model, weights = self.copy()
        for inputs, targets in batches:
            loss(model(inputs), targets).backward()
        scores = {
            name: torch.zeros_like(weight) if weight.grad is None else weight.detach() * weight.grad
            for name, weight in weights.items()
        }
        self.keep(scores, self._sparsity)
