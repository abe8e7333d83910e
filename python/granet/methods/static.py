"""Masks that never change."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import nn

from granet.distributions import Distribution
from granet.dynamic import DynamicSparsifier, Plan
from granet.engine import Options
from granet.schedules import never


class StaticRandom(DynamicSparsifier):
    """Random masks at the start, which stay: what every other method should be better than.

    Args: as in :class:`granet.GraNet`.
    """

    name = "static"
    source = "Liu et al., ICLR 2022, arXiv 2202.02643"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sparsity: float,
        total_steps: int,
        distribution: str | Distribution = "erk",
        floor: int = 1,
        **options: Unpack[Options],
    ) -> None:
        plan = Plan(
            sparsity=sparsity, initial_sparsity=sparsity, distribution=distribution, floor=floor
        )
        super().__init__(model, optimizer, plan, total_steps=total_steps, clock=never(), **options)
