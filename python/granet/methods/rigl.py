"""RigL and RigL-ITOP."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import nn

from granet.distributions import Distribution
from granet.dynamic import DynamicSparsifier, Plan
from granet.engine import Options
from granet.schedules import Schedule, as_drop_schedule, as_step, updates
from granet.topology import Exchange, Regrown


class RigL(DynamicSparsifier):
    """The rigged lottery: sparse from the start; connections move to where the gradient is largest.

    Args:
        sparsity: from the first step to the last.
        update_until: time of the last update, in steps or as ``"75%"`` of the run; the drop fraction,
            if it is a number, decays to zero there by a cosine.

    The others, and the errors, are as in :class:`granet.GraNet`.
    """

    name = "rigl"
    source = "Evci et al., ICML 2020, arXiv 1911.11134"
    cosine_floor = 0.0
    """Drop fraction at the last update."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sparsity: float,
        total_steps: int,
        update_every: int | str = 100,
        update_until: int | str = "75%",
        drop_fraction: float | Schedule = 0.3,
        redistribution: str = "none",
        regrown: Regrown = "keep",
        distribution: str | Distribution = "erk",
        floor: int = 1,
        official_rounding: bool = False,
        **options: Unpack[Options],
    ) -> None:
        until = as_step(update_until, total_steps, "update_until")
        clock = updates(total_steps, update_every, until=until, official_rounding=official_rounding)
        plan = Plan(
            sparsity=sparsity,
            initial_sparsity=sparsity,
            distribution=distribution,
            floor=floor,
            drop_fraction=as_drop_schedule(
                drop_fraction, "cosine", max(until, 1), cosine_floor=self.cosine_floor
            ),
            exchange=Exchange(redistribution=redistribution, regrown=regrown),
            official_rounding=official_rounding,
        )
        super().__init__(model, optimizer, plan, total_steps=total_steps, clock=clock, **options)


class RigLITOP(RigL):
    """RigL with the settings of in-time over-parameterization: rarer, larger updates, to the end.

    Weights get time to be trained before they compete, and over the run nearly every connection has
    been tried. In the code of the GraNet paper this is called DST.

    Args: as in :class:`RigL`; the drop fraction decays to 0.005 over the whole run.
    """

    name = "rigl-itop"
    source = "Liu et al., ICML 2021, arXiv 2102.02887"
    cosine_floor = 0.005

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sparsity: float,
        total_steps: int,
        update_every: int | str = 4000,
        drop_fraction: float | Schedule = 0.5,
        redistribution: str = "none",
        regrown: Regrown = "keep",
        distribution: str | Distribution = "erk",
        floor: int = 1,
        official_rounding: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            model,
            optimizer,
            sparsity=sparsity,
            total_steps=total_steps,
            update_every=update_every,
            update_until="100%",
            drop_fraction=drop_fraction,
            redistribution=redistribution,
            regrown=regrown,
            distribution=distribution,
            floor=floor,
            official_rounding=official_rounding,
            **options,
        )
