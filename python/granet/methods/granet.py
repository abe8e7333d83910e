"""GraNet."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import nn

from granet.counts import Scope
from granet.distributions import Distribution
from granet.dynamic import DynamicSparsifier, Plan
from granet.engine import Options
from granet.schedules import Curve, Schedule, as_drop_schedule, gradual
from granet.topology import Exchange, Regrown


class GraNet(DynamicSparsifier):
    """Gradual magnitude pruning with zero-cost neuroregeneration (NeurIPS 2021, Algorithm 1).

    Every ``update_every`` steps it prunes to the sparsity that the ramp asks for (Eq. 1), then in
    each layer drops the smallest weights and regrows as many where the gradient is largest.

    Args:
        model: with masked layers (:func:`granet_kernels.sparsify`).
        optimizer: of the model's parameters; MaskedSGD is the fast one, any works.
        sparsity: at the end, over all masked layers together, in [0, 1). Met exactly:
            ``numel - round(numel * sparsity)`` weights stay active.
        total_steps: length of the run in optimizer steps.
        initial_sparsity: 0 starts dense (or with the masks that are there); above that each layer
            starts with a random mask.
        update_every: steps from one update to the next, or a share of the run such as ``"2%"``.
        prune_from, prune_until: the ramp, in steps or as ``"50%"`` of the run. Before
            ``prune_from`` masks stay as they are; after ``prune_until`` weights are still dropped
            and regrown. Steps that an AMP scaler skips are missing at the end of a run: leave some
            updates' time after ``prune_until``.
        ramp: "cubic" as published, "linear", "cosine", "sigmoid", "constant" (all at the first
            prune), or a function from the share of the ramp that is over to the share of the rise.
        drop_fraction: share of each layer's active weights that an update replaces: a number, which
            ``drop_schedule`` lets decay over the run, or a schedule.
        drop_schedule: "cosine" (to 0.005, as published), "linear" (to 0) or "constant".
        drop: which weights are dropped: "magnitude" as published, "sign" or "random"
            (:mod:`granet.criteria`).
        grow: where connections grow: "gradient" as published, "momentum" or "random".
        redistribution: how many each layer regrows: "none", as many as it dropped; "magnitude" or
            "momentum", in proportion to the mean of those in it.
        regrown: how regrown weights start: "keep" as published, "zero" or "layer_mean"
            (:mod:`granet.topology`).
        distribution: of the initial sparsity, and of every prune with ``scope="layer"``: "erk",
            "er", "uniform", or a rule of :mod:`granet.distributions`.
        scope: prune by magnitude over all layers together ("global"), or each to its own budget
            ("layer").
        floor: fewest weights that a layer keeps.
        official_rounding: counts of the published code: random budgets at the start, the k-th
            largest weight itself pruned, no floor, a ramp that ends one prune short of its target,
            an update on the last step.
        options: of every method (:class:`granet.engine.Options`).

    Raises:
        ValueError: a value out of range, a ramp without an update, or a sparsity that would leave
            a layer fewer weights than ``floor``.
    """

    name = "granet"
    source = "Liu et al., NeurIPS 2021, arXiv 2106.10404"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sparsity: float,
        total_steps: int,
        initial_sparsity: float = 0.0,
        update_every: int | str = 1000,
        prune_from: int | str = 0,
        prune_until: int | str = "50%",
        ramp: str | Curve = "cubic",
        drop_fraction: float | Schedule = 0.5,
        drop_schedule: str = "cosine",
        drop: str = "magnitude",
        grow: str = "gradient",
        redistribution: str = "none",
        regrown: Regrown = "keep",
        distribution: str | Distribution = "erk",
        scope: Scope = "global",
        floor: int = 1,
        official_rounding: bool = False,
        **options: Unpack[Options],
    ) -> None:
        rise, clock = gradual(
            initial_sparsity,
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
            initial_sparsity=initial_sparsity,
            distribution=distribution,
            scope=scope,
            floor=floor,
            ramp=rise,
            drop_fraction=as_drop_schedule(drop_fraction, drop_schedule, total_steps),
            exchange=Exchange(drop=drop, redistribution=redistribution, regrown=regrown),
            grow=grow,
            official_rounding=official_rounding,
        )
        super().__init__(model, optimizer, plan, total_steps=total_steps, clock=clock, **options)
