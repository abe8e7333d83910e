"""Growth scores: what they need from the steps before an update, and what they are at it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from granet.criteria import GROWTH
from granet.placement import Layer, Whole

MOMENTUM, MOMENTUM_STEPS = 0.9, 20
"""Decay of the running mean of gradients, and steps over which it is taken: what came before those
would count 0.9 ** 20, an eighth. Dense gradients cost a dense backward pass, so not at every step."""


class Growth:
    """The scores of one criterion, a key of ``granet.criteria.GROWTH``.

    Attributes:
        window: steps up to an update whose weight gradients must be dense.
    """

    def __init__(self, criterion: str) -> None:
        if criterion not in GROWTH:
            known = ", ".join(GROWTH)
            raise ValueError(f"grow: expected one of {known}, got {criterion!r}")
        self.criterion = criterion
        self.window = {"gradient": 1, "momentum": MOMENTUM_STEPS, "random": 0}[criterion]
        self._means: dict[str, Tensor] = {}

    def observe(self, layers: Mapping[str, Layer], grad_scale: Tensor | None) -> None:
        """Take in the gradients of a step in the window; ``grad_scale`` is what they are multiplied by."""
        if self.criterion != "momentum":
            return
        for name, layer in layers.items():
            gradient = layer.weight.grad
            if gradient is None:
                continue
            if grad_scale is not None:
                gradient = gradient / grad_scale
            mean = self._means.get(name)
            if mean is None:
                self._means[name] = gradient.detach().float().clone()
            else:
                mean.mul_(MOMENTUM).add_(gradient)

    def scores(
        self, layers: Mapping[str, Layer], place: Whole, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """By layer; layers that are frozen have none, nor where gradients decide those not used."""
        if self.criterion == "momentum":
            return {name: place.local(mean) for name, mean in self._means.items()}
        if self.criterion == "random":
            return {
                name: place.random_scores(layer.weight, generator)
                for name, layer in layers.items()
                if layer.weight.requires_grad
            }
        return {
            name: place.local(layer.weight.grad)
            for name, layer in layers.items()
            if layer.weight.grad is not None
        }

    def forget(self) -> None:
        """Start over: after an update, or where a gradient was not finite."""
        self._means.clear()

    def state_dict(self) -> dict[str, Any]:
        """Running means, where there are any."""
        return {name: mean.clone() for name, mean in self._means.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], layers: Mapping[str, Layer]) -> None:
        """Continue where ``state`` was taken."""
        self._means = {
            name: mean.to(layers[name].weight.device, copy=True) for name, mean in state.items()
        }
