"""Two masked linear layers, and a step of their training, for the edges of the engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from granet_kernels import MaskedSGD, sparsify, use_backend

STEPS = 20


@pytest.fixture(autouse=True)
def reference_backend() -> Iterator[None]:
    with use_backend("reference"):
        yield


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return sparsify(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))


def sgd(model: nn.Module, momentum: float = 0.9) -> MaskedSGD:
    return MaskedSGD(model.parameters(), lr=0.01, momentum=momentum)


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: Any, poison: bool = False
) -> bool:
    generator = torch.Generator().manual_seed(sparsifier.steps)
    model(torch.randn(8, 8, generator=generator)).square().mean().backward()
    if poison:
        layer = sparsifier.layers["0"]
        layer.weight.grad[~layer.mask] = torch.nan
    optimizer.step()
    try:
        return bool(sparsifier.step())
    finally:
        optimizer.zero_grad()
