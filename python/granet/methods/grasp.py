"""GraSP."""

from __future__ import annotations

import torch
from torch import Tensor

from granet.at_start import AtStart, Loss


class GraSP(AtStart):
    """Gradient signal preservation: keep the weights whose removal would slow the loss's descent most.

    With the gradient g and the Hessian H of the loss, removing a weight changes ``g.T g`` by about
    ``-weight * (H g)`` (Eq. 8); those of largest such value are removed. Outputs are divided by a
    temperature before the loss, as published, so that a confident network has a gradient at all.

    Args: as in :class:`granet.at_start.AtStart`.
    """

    name = "grasp"
    source = "Wang et al., ICLR 2020, arXiv 2002.07376"
    temperature = 200.0

    def select(self, batches: list[tuple[Tensor, Tensor]], loss: Loss) -> None:
        model, weights = self.copy()
        parameters = list(weights.values())
        products = [torch.zeros_like(weight, dtype=torch.float64) for weight in parameters]
        for inputs, targets in batches:
            value = loss(model(inputs) / self.temperature, targets)
            gradients = torch.autograd.grad(
                value, parameters, create_graph=True, allow_unused=True, materialize_grads=True
            )
            flow = torch.stack([(g * g.detach()).sum() for g in gradients]).sum()
            hessian = torch.autograd.grad(
                flow, parameters, allow_unused=True, materialize_grads=True
            )
            for total, weight, product in zip(products, parameters, hessian, strict=True):
                total.sub_(weight.detach() * product)
        self._replicas.add(products)
        self.check_finite(dict(zip(weights, products, strict=True)))
        # Small is good: turned round so that it can be ranked by magnitude.
        largest = torch.stack([product.max() for product in products]).max()
        scores = {name: largest - product for name, product in zip(weights, products, strict=True)}
        self.topology.keep(scores, self.target_active, floor=self._floor)
