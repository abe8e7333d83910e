"""Gradual magnitude pruning."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import nn

from granet.counts import Scope
from granet.distributions import Distribution
from granet.dynamic import DynamicSparsifier, Plan
from granet.engine import Options
from granet.schedules import Curve, gradual


class GMP(DynamicSparsifier):
    """Gradual magnitude pruning: a dense start, smaller weights pruned update by update, none regrown.

    Args: as in :class:`granet.GraNet`. The published code (``official_rounding``) starts dense whatever
        the layers have: here masks that are there stay.
    """

    name = "gmp"
    source = "Zhu & Gupta, 2017, arXiv 1710.01878"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sparsity: float,
        total_steps: int,
        update_every: int | str = 1000,
        prune_from: int | str = 0,
        prune_until: int | str = "50%",
        ramp: str | Curve = "cubic",
        distribution: str | Distribution = "erk",
        scope: Scope = "global",
        floor: int = 1,
        official_rounding: bool = False,
        **options: Unpack[Options],
    ) -> None:
        rise, clock = gradual(
            0.0,
            sparsity,
            total_steps=total_steps,
            every=update_every,
            prune_from=prune_from,
            prune_until=prune_until,
            curve=ramp,
            official_rounding=official_rounding,
        )
        plan = Plan(
            sparsity=sparsity,
            distribution=distribution,
            scope=scope,
            floor=floor,
            ramp=rise,
            official_rounding=official_rounding,
        )
        super().__init__(model, optimizer, plan, total_steps=total_steps, clock=clock, **options)
