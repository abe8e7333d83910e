"""One prune by magnitude, and fine-tuning."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import nn

from granet.counts import Scope
from granet.distributions import Distribution
from granet.dynamic import DynamicSparsifier, Plan
from granet.engine import Options
from granet.schedules import Ramp, UpdateClock, as_step, check_sparsities, never


class OneShot(DynamicSparsifier):
    """Train densely, prune once by magnitude, train what is left.

    With the masks of a sparse checkpoint (``init="from_zeros"``) and the sparsity that it has, the
    whole run is fine-tuning at fixed masks.

    Args:
        prune_at: time of the prune, in steps or as ``"50%"`` of the run; 0 prunes the weights that the
            model comes with.

    The others, and the errors, are as in :class:`granet.GraNet`.
    """

    name = "one-shot"
    source = "Han et al., NeurIPS 2015, arXiv 1506.02626"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sparsity: float,
        total_steps: int,
        prune_at: int | str = "50%",
        distribution: str | Distribution = "erk",
        scope: Scope = "global",
        floor: int = 1,
        **options: Unpack[Options],
    ) -> None:
        check_sparsities(0.0, sparsity)
        at = as_step(prune_at, total_steps, "prune_at")
        ramp, clock = None, never()
        if at > 0:
            ramp = Ramp(initial=0.0, final=sparsity, begin=at, end=at, every=at)
            clock = UpdateClock(every=at, start=at, stop=at + 1)
        plan = Plan(
            sparsity=sparsity,
            distribution=distribution,
            scope=scope,
            floor=floor,
            prune_first=at == 0,
            ramp=ramp,
        )
        super().__init__(model, optimizer, plan, total_steps=total_steps, clock=clock, **options)
