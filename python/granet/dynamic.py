"""Methods that change masks during training: prune along a ramp, then exchange connections.

Most methods are a choice of what is in :class:`Plan`. This class carries it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Unpack

import torch
from torch import nn

from granet.counts import ActiveCounts, Scope
from granet.criteria import GROWTH
from granet.distributed import unwrapped
from granet.distributions import Distribution, active_budget
from granet.engine import Options, Sparsifier
from granet.placement import layers_of
from granet.redistribution import check_redistribution
from granet.schedules import Ramp, Schedule, UpdateClock, check_sparsities
from granet.sharded import placement_of
from granet.topology import Exchange


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a method is: the masks it starts with, and what its updates do."""

    sparsity: float
    """At the end, over all masked layers together."""
    initial_sparsity: float = 0.0
    """At the start: of random masks where the layers are dense, or else of a prune of the masks that are
    there. 0 leaves masks as they are."""
    prune_first: bool = False
    """Whether the model is pruned to its sparsity before it is trained."""
    distribution: str | Distribution = "erk"
    """Of the initial sparsity, and of prunes with ``scope="layer"``."""
    scope: Scope = "global"
    """Of prunes: by magnitude over all layers together, or each layer to its own budget."""
    floor: int = 1
    """Fewest active weights of a layer."""
    ramp: Ramp | None = None
    """Which updates prune, and to what sparsity."""
    drop_fraction: Schedule | None = None
    """Share of each layer's active weights that an update exchanges."""
    exchange: Exchange = field(default_factory=Exchange)
    grow: str = "gradient"
    """Criterion of what grows."""
    official_rounding: bool = False
    """Counts of the published code."""

    def __post_init__(self) -> None:
        check_sparsities(self.initial_sparsity, self.sparsity)
        if self.grow not in GROWTH:
            known = ", ".join(GROWTH)
            raise ValueError(f"grow: expected one of {known}, got {self.grow!r}")


class DynamicSparsifier(Sparsifier):
    """Carries out a :class:`Plan`; see :class:`granet.engine.Sparsifier`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        *,
        total_steps: int,
        clock: UpdateClock,
        **options: Unpack[Options],
    ) -> None:
        """Checks that the plan is feasible, then makes the masks that training starts with.

        Raises:
            ValueError: a sparsity that would leave a layer fewer weights than its floor.
        """
        layers = layers_of(unwrapped(model))
        self.plan = plan
        self.counts = ActiveCounts(
            shapes=[tuple(layer.weight.shape) for layer in layers.values()],
            distribution=plan.distribution,
            scope=plan.scope,
            floor=plan.floor,
            official_rounding=plan.official_rounding,
        )
        if options.get("init") == "from_zeros":
            place = placement_of(layers)
            active = place.counts_of(place.nonzero(place.parts(layers.values())))
        else:
            active = [layer.count_active() for layer in layers.values()]
        is_dense = sum(active) == sum(layer.weight.numel() for layer in layers.values())
        self.counts.check_feasible(plan.sparsity, active)
        if plan.drop_fraction is not None:
            check_redistribution(plan.exchange.redistribution, optimizer)
        super().__init__(
            model,
            optimizer,
            total_steps=total_steps,
            clock=clock,
            growth=None if plan.drop_fraction is None else plan.grow,
            settings=_settings(plan),
            **options,
        )
        if plan.initial_sparsity > 0 and is_dense:
            self.randomize(self.counts.initial(plan.initial_sparsity, self.topology.generator))
        elif plan.initial_sparsity > 0:  # never over what has been trained sparsely
            self._prune_to(plan.initial_sparsity)
        if plan.prune_first:
            self._prune_to(plan.sparsity)
        self.begin()

    def sparsity_at(self, step: int) -> float:
        ramp = self.plan.ramp
        return self.plan.sparsity if ramp is None else ramp(self._until_frozen(step))

    @property
    def target_active(self) -> int:
        """Active weights at the end, unless ``official_rounding`` misses them."""
        return active_budget(self.plan.sparsity, self.numel)

    @property
    def is_final(self) -> bool:
        ramp = self.plan.ramp
        return super().is_final and (ramp is None or self._until_frozen(self.steps) >= ramp.end)

    def _until_frozen(self, step: int) -> int:
        return step if self.frozen_at is None else min(step, self.frozen_at)

    def update(self, step: int) -> None:
        """Prune to the ramp, also for updates that were postponed and never made up for; then exchange."""
        plan = self.plan
        fraction = None if plan.drop_fraction is None else _share(plan.drop_fraction(step))
        # What regrew on the last step would stay zero; the published code does not mind.
        if self.steps >= self.total_steps and not plan.official_rounding:
            fraction = None
        missed = range(self.postponed_since(step), step + 1)
        if plan.ramp is not None and any(map(plan.ramp.prunes_at, missed)):
            self._prune_to(plan.ramp(step), fraction)
        elif fraction is not None:
            self.exchange(fraction, plan.exchange, floor=plan.floor)

    def _prune_to(self, sparsity: float, fraction: float | None = None) -> None:
        """And exchange a fraction of what is left, if one is given."""
        active = self.active_counts() if self.plan.scope == "layer" else []
        k = self.counts.after_prune(sparsity, active)
        floor = 0 if self.plan.official_rounding else self.plan.floor
        if fraction is None:
            self.prune(k, floor=floor)
        else:
            floors = floor, self.plan.floor
            self.prune_and_exchange(k, fraction, self.plan.exchange, floors=floors)


def _share(fraction: float) -> float:
    if not 0 <= fraction <= 1:
        raise ValueError(
            f"drop_fraction: expected numbers in [0, 1] of the schedule, got {fraction}"
        )
    return fraction


def _settings(plan: Plan) -> Mapping[str, Any]:
    return {name: getattr(plan, name) for name in plan.__slots__}
