"""What a run's settings plan for its sparsity, without its network or its data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from granet.at_start import AtStart
from granet.training import build
from granet.training.config import TrainConfig
from granet_kernels import sparsify


def planned_sparsity(
    config: TrainConfig, shapes: Sequence[Sequence[int]], total_steps: int
) -> tuple[Callable[[int], float], list[int]]:
    """The sparsity a method plans to have after each step, and the steps at which it changes masks.

    Args:
        config: a run that is not dense.
        shapes: those of its masked weights, in order; schedules depend on nothing else of a network.
        total_steps: its length.
    """
    model = sparsify(torch.nn.ModuleList(map(_layer_of, shapes)))
    optimizer = build.build_optimizer(config, model)
    sparsifier = build.build_sparsifier(config, model, optimizer, total_steps)
    assert sparsifier is not None
    updates = [step for step in range(total_steps + 1) if sparsifier.clock.is_update(step)]
    if isinstance(sparsifier, AtStart):  # which has nothing pruned before it is given batches
        return (lambda step: config.sparsity), updates
    return sparsifier.sparsity_at, updates


def _layer_of(shape: Sequence[int]) -> torch.nn.Module:
    if len(shape) == 2:
        return torch.nn.Linear(shape[1], shape[0], bias=False)
    return torch.nn.Conv2d(shape[1], shape[0], (shape[2], shape[3]), bias=False)
