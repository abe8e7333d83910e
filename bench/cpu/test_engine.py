"""What the engine adds to a training step outside updates: its optimizer hook, and `sparsifier.step()`."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

pytest.importorskip("torchvision", reason="the networks are torchvision's")

import torch
import torch.nn.functional as F
from torch import nn

from bench.cpu import verdict
from bench.cpu.networks import QUICK_RESNET18, RESNET50, SGD, TRAINING_STEP, Network
from bench.cpu.race import Contender, Seconds
from bench.cpu.targets import ENGINE
from granet import GraNet
from granet_kernels import MaskedSGD, sparsify

SECONDS = 20.0
SPARSITY, STEPS = 0.9, 10_000  # more than any run takes, so that no update is near
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "MaskedSGD": lambda model: MaskedSGD(model.parameters(), **SGD),
    # The engine sets inactive weights and states to zero after each step of any other optimizer.
    "torch SGD": lambda model: torch.optim.SGD(model.parameters(), **SGD),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
}


class Training:
    """Steps of a network, and what of the last one was the engine's."""

    def __init__(self, network: Network, optimizer: str) -> None:
        self._model = sparsify(network.build())
        self._optimizer = OPTIMIZERS[optimizer](self._model)
        self._data = network.data("contiguous")
        self._engine = 0.0
        self._since = 0.0
        # Hooks are called in the order of their registration: the engine's is the one in between.
        self._optimizer.register_step_post_hook(self._begin)
        self._sparsifier = GraNet(
            self._model,
            self._optimizer,
            sparsity=SPARSITY,
            initial_sparsity=SPARSITY,
            total_steps=STEPS,
            update_every=STEPS // 2,
        )
        self._optimizer.register_step_post_hook(self._end)

    def _begin(self, *_: object) -> None:
        self._since = time.perf_counter()

    def _end(self, *_: object) -> None:
        self._engine = time.perf_counter() - self._since

    def step(self) -> Seconds:
        """A whole step."""
        start = time.perf_counter()
        images, labels = self._data
        F.cross_entropy(self._model(images), labels).backward()
        self._optimizer.step()
        since = time.perf_counter()
        assert not self._sparsifier.step()
        self._engine += time.perf_counter() - since
        self._optimizer.zero_grad()
        return {TRAINING_STEP: time.perf_counter() - start}

    def engine(self) -> Seconds:
        """The engine's part of the last one."""
        return {TRAINING_STEP: self._engine}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_outside_updates(optimizer, all_threads, effort, race, ledger):
    network = QUICK_RESNET18 if effort.quick else RESNET50
    training = Training(network, optimizer)
    done = race(
        [
            Contender(role=TRAINING_STEP, variant=optimizer, build=lambda: training.step),
            Contender(role="engine", variant=optimizer, build=lambda: training.engine),
        ],
        SECONDS,
        least=3,
    )
    row = verdict.row(
        done,
        group="engine",
        case=f"{network}, {optimizer}",
        measure=TRAINING_STEP,
        threads=all_threads,
        sparsity=SPARSITY,
        baseline=TRAINING_STEP,
        ours="engine",
        cost=True,
        target=ENGINE if optimizer == "MaskedSGD" and not effort.quick else None,
    )
    assert row is not None
    ledger.append(row)
