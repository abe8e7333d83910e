"""GraNet."""

from __future__ import annotations

import torch
from torch import nn

from granet.counts import ActiveCounts, Scope
from granet.distributions import active_budget
from granet.engine import Sparsifier, layers_of
from granet.schedules import CosineDecay, CubicRamp, Schedule, UpdateClock, as_step


class GraNet(Sparsifier):
    """Gradual magnitude pruning with zero-cost neuroregeneration (NeurIPS 2021, Algorithm 1).

    Every ``update_every`` steps it prunes to the sparsity that the cubic ramp asks for (Eq. 1),
    then in each layer drops the smallest weights and regrows as many where the gradient is largest.

    Args:
        model: with masked layers (:func:`granet_kernels.sparsify`).
        optimizer: of the model's parameters; MaskedSGD is the fast one, any works.
        sparsity: at the end, over all masked layers together, in [0, 1). Met exactly:
            ``numel - round(numel * sparsity)`` weights stay active.
        total_steps: length of the run in optimizer steps.
        initial_sparsity: 0 starts dense; above that each layer starts with a random mask.
        update_every: steps from one update to the next.
        prune_from, prune_until: the ramp, in steps or as ``"50%"`` of the run. Before
            ``prune_from`` masks stay as they are; after ``prune_until`` weights are still dropped
            and regrown. Steps that an AMP scaler skips are missing at the end of a run: leave some
            updates' time after ``prune_until``.
        drop_fraction: share of each layer's active weights that an update replaces: a number, which
            decays to 0.005 by a cosine over the run as published, or a schedule.
        distribution: of the initial sparsity, and of every prune with ``scope="layer"``: "erk" or
            "uniform".
        scope: prune by magnitude over all layers together ("global"), or each to its own budget
            ("layer").
        official_rounding: counts of the published code: random budgets at the start, the k-th
            largest weight itself pruned, a ramp that ends one prune short of its target, an update
            on the last step.
        seed: of the masks at the start.

    Raises:
        ValueError: a value out of range, a ramp without an update, or a sparsity that would leave
            less than a weight in each layer.
    """

    needs_dense_gradient = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sparsity: float,
        total_steps: int,
        initial_sparsity: float = 0.0,
        update_every: int = 1000,
        prune_from: int | str = 0,
        prune_until: int | str = "50%",
        drop_fraction: float | Schedule = 0.5,
        distribution: str = "erk",
        scope: Scope = "global",
        official_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        _check_settings(initial_sparsity, sparsity, drop_fraction, update_every)
        start = as_step(prune_from, total_steps, "prune_from")
        until = as_step(prune_until, total_steps, "prune_until")
        # What regrows on the last step would stay zero, but the published code does it.
        last = total_steps if official_rounding else total_steps - 1
        self.ramp = CubicRamp(
            initial=initial_sparsity,
            final=sparsity,
            begin=start,
            end=min(until, last),
            every=update_every,
            official_rounding=official_rounding,
        )
        self.drop_fraction = _as_schedule(drop_fraction, total_steps)
        settings = {
            "sparsity": sparsity,
            "total_steps": total_steps,
            "initial_sparsity": initial_sparsity,
            "update_every": update_every,
            "prune_from": start,
            "prune_until": until,
            "drop_fraction": None if callable(drop_fraction) else drop_fraction,
            "distribution": distribution,
            "scope": scope,
            "official_rounding": official_rounding,
        }
        clock = UpdateClock(every=update_every, start=start, stop=max(last + 1, start))
        layers = layers_of(model).values()
        self.counts = ActiveCounts(
            shapes=[tuple(layer.weight.shape) for layer in layers],
            distribution=distribution,
            scope=scope,
            official_rounding=official_rounding,
        )
        redrawn = initial_sparsity > 0
        self.counts.check_feasible(
            sparsity,
            [layer.weight.numel() if redrawn else layer.count_active() for layer in layers],
        )
        super().__init__(
            model, optimizer, total_steps=total_steps, clock=clock, settings=settings, seed=seed
        )
        if initial_sparsity > 0:
            self.randomize(self.counts.initial(initial_sparsity, self._generator))
        self._ask_for_dense_gradient()

    @property
    def sparsity(self) -> float:
        return self.ramp(self.steps)

    @property
    def target_active(self) -> int:
        """Active weights at the end, unless ``official_rounding`` misses them."""
        return active_budget(self.ramp.final, self.numel)

    def update(self, step: int) -> None:
        """Prune to the ramp, then drop and regrow."""
        if self.ramp.prunes_at(step):
            active = self.active_counts() if self.counts.scope == "layer" else []
            self.prune(self.counts.after_prune(self.ramp(step), active))
        self.drop_regrow(self.drop_fraction(step))


def _as_schedule(drop_fraction: float | Schedule, total_steps: int) -> Schedule:
    if callable(drop_fraction):
        return drop_fraction
    floor = min(0.005, drop_fraction)  # the published code's last value
    return CosineDecay(initial=drop_fraction, total_steps=total_steps, floor=floor)


def _check_settings(
    initial_sparsity: float, sparsity: float, drop_fraction: float | Schedule, update_every: int
) -> None:
    for name, value in (("initial_sparsity", initial_sparsity), ("sparsity", sparsity)):
        if not 0 <= value < 1:
            raise ValueError(f"{name}: expected a number in [0, 1), got {value}")
    if initial_sparsity > sparsity:
        raise ValueError(
            f"initial_sparsity: expected at most sparsity, {sparsity}, got {initial_sparsity}"
        )
    if not callable(drop_fraction) and not 0 <= drop_fraction <= 1:
        raise ValueError(f"drop_fraction: expected a number in [0, 1], got {drop_fraction}")
    if update_every < 1:
        raise ValueError(f"update_every: expected at least 1 step, got {update_every}")
