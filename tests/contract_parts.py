"""A network, its optimizers and its training, for what holds for every method (``test_contract*.py``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from granet.engine import Sparsifier
from granet_kernels import MaskedSGD, sparsify, use_backend

STEPS = 24
SETTINGS: dict[str, Any] = {"sparsity": 0.8, "total_steps": STEPS, "update_every": 4}
Optimizer = torch.optim.Optimizer


@pytest.fixture(autouse=True)
def reference_backend() -> Iterator[None]:
    with use_backend("reference"):
        yield


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, 9),
        nn.Linear(9, 4),
    )
    return sparsify(model).to(dtype)


def sgd(model: nn.Module) -> Optimizer:
    return MaskedSGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def batch(step: int, dtype: torch.dtype = torch.float32, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(size, 2, 5, 5, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.randint(4, (size,), generator=generator)


def backward(model: nn.Module, step: int) -> None:
    images, labels = batch(step)
    nn.functional.cross_entropy(model(images), labels).backward()


def train(
    model: nn.Module,
    optimizer: Optimizer,
    sparsifier: Sparsifier,
    start: int = 0,
    stop: int = STEPS,
) -> None:
    for step in range(start, stop):
        backward(model, step)
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()


def masks(sparsifier: Sparsifier) -> dict[str, Tensor]:
    return {name: layer.mask for name, layer in sparsifier.layers.items()}


def same_masks(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(mask, right[name]) for name, mask in left.items())


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "MaskedSGD": sgd,
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-2, amsgrad=True),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, foreach=True),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3, momentum=0.9, centered=True),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-2),
    "Lamb": lambda m: Lamb(m.parameters(), lr=1e-2),
}


class Lamb(Optimizer):
    """LAMB (You et al., 2020), as a third party would write it: no hooks, states of its own names."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state |= {"m": torch.zeros_like(param), "v": torch.zeros_like(param), "t": 0}
                state["t"] += 1
                state["m"].lerp_(param.grad, 0.1)
                state["v"].lerp_(param.grad.square(), 0.001)
                first, second = 1 - 0.9 ** state["t"], 1 - 0.999 ** state["t"]
                update = state["m"] / first / ((state["v"] / second).sqrt() + 1e-6)
                update += 0.01 * param
                trust = param.norm() / update.norm()
                trust = torch.where(trust > 0, trust, 1.0).nan_to_num(nan=1.0, posinf=1.0)
                param -= group["lr"] * trust * update
