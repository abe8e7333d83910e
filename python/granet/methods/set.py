"""Sparse evolutionary training."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import nn

from granet.distributions import Distribution
from granet.dynamic import DynamicSparsifier, Plan
from granet.engine import Options
from granet.schedules import Schedule, as_drop_schedule, as_step, updates
from granet.topology import Exchange, Regrown


class SET(DynamicSparsifier):
    """Sparse evolutionary training: weights next to zero are replaced by random connections.

    It never needs the gradient of an inactive weight.

    Args:
        sparsity: from the first step to the last.
        update_until: time of the last update, in steps or as ``"75%"`` of the run.
        drop: "sign" as published (the same share of positive and of negative weights), or
            "magnitude".

    The others, and the errors, are as in :class:`granet.GraNet`.
    """

    name = "set"
    source = "Mocanu et al., Nature Communications 2018, arXiv 1707.04780"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sparsity: float,
        total_steps: int,
        update_every: int | str = 1000,
        update_until: int | str = "100%",
        drop_fraction: float | Schedule = 0.3,
        drop_schedule: str = "constant",
        drop: str = "sign",
        redistribution: str = "none",
        regrown: Regrown = "keep",
        distribution: str | Distribution = "er",
        floor: int = 1,
        **options: Unpack[Options],
    ) -> None:
        until = as_step(update_until, total_steps, "update_until")
        plan = Plan(
            sparsity=sparsity,
            initial_sparsity=sparsity,
            distribution=distribution,
            floor=floor,
            drop_fraction=as_drop_schedule(drop_fraction, drop_schedule, total_steps),
            exchange=Exchange(drop=drop, redistribution=redistribution, regrown=regrown),
            grow="random",
        )
        clock = updates(total_steps, update_every, until=until)
        super().__init__(model, optimizer, plan, total_steps=total_steps, clock=clock, **options)
