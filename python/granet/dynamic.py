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
from granet.distributed import unwrapped
from granet.distributions import Distribution, active_budget
from granet.engine import Options, Sparsifier, layers_of
from granet.schedules import Ramp, Schedule, UpdateClock, check_sparsities
from granet.sharded import placement_of
from granet.topology import Exchange


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a method is: the masks it starts with, and what its updates do."""

    sparsity: float
    """At the end, over all masked layers together."""
    initial_sparsity: float = 0.0
    """Of random masks at the start; 0 leaves the masks as they are."""
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
        if plan.initial_sparsity > 0:
            active = [layer.weight.numel() for layer in layers.values()]
        elif options.get("init") == "from_zeros":
            place = placement_of(layers)
            active = place.counts_of(place.nonzero(place.parts(layers.values())))
        else:
            active = [layer.count_active() for layer in layers.values()]
        self.counts.check_feasible(plan.sparsity, active)
        super().__init__(
            model,
            optimizer,
            total_steps=total_steps,
            clock=clock,
            growth=None if plan.drop_fraction is None else plan.grow,
            settings=_settings(plan),
            **options,
        )
        if plan.initial_sparsity > 0:
            generator = self.topology.generator
            self.randomize(self.counts.initial(plan.initial_sparsity, generator))
        if plan.prune_first:
            self._prune_to(plan.sparsity)
        self.begin()

    @property
    def sparsity(self) -> float:
        ramp = self.plan.ramp
        return self.plan.sparsity if ramp is None else ramp(self.steps)

    @property
    def target_active(self) -> int:
        """Active weights at the end, unless ``official_rounding`` misses them."""
        return active_budget(self.plan.sparsity, self.numel)

    @property
    def is_final(self) -> bool:
        ramp = self.plan.ramp
        return super().is_final and (ramp is None or self.steps >= ramp.end)

    def update(self, step: int) -> None:
        """Prune to the ramp, then exchange connections."""
        plan = self.plan
        if plan.ramp is not None and plan.ramp.prunes_at(step):
            self._prune_to(plan.ramp(step))
        if plan.drop_fraction is not None:
            self.exchange(plan.drop_fraction(step), plan.exchange, floor=plan.floor)

    def _prune_to(self, sparsity: float) -> None:
        active = self.active_counts() if self.plan.scope == "layer" else []
        floor = 0 if self.plan.official_rounding else self.plan.floor
        self.prune(self.counts.after_prune(sparsity, active), floor=floor)


def _settings(plan: Plan) -> Mapping[str, Any]:
    return {name: getattr(plan, name) for name in plan.__slots__}
