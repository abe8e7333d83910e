"""Lottery tickets: iterative magnitude pruning with rewinding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from granet.counts import check_enough
from granet.distributed import unwrapped
from granet.distributions import active_budget, layer_budgets
from granet.engine import Options, Sparsifier
from granet.placement import layers_of
from granet.schedules import UpdateClock, as_step


class LotteryTicket(Sparsifier):
    """Train, prune the smallest weights, rewind the others, and again, to the sparsity.

    A run is ``rounds + 1`` trainings of :attr:`round_steps` each. At the end of each but the last
    the smallest magnitudes are pruned, so that every round leaves the same share of the weights
    before it, and the network returns to what it was early in the first training; the optimizer
    forgets. A learning rate schedule must start over with every round: give it :meth:`step_of_round`.

    Args:
        rounds: prunes. A fifth of the weights at a time, as published, takes 11 to 90 %.
        rewind_to: the step that the network returns to, or a share of a round; 0 is the
            initialisation (Frankle & Carbin, 2019), a little later is better for deep networks
            (Frankle et al., 2020, arXiv 1912.05671).

    The others, and the errors, are as in :class:`granet.GraNet`; ``total_steps`` must hold a step for
    each training.
    """

    name = "lottery-ticket"
    source = "Frankle & Carbin, ICLR 2019, arXiv 1803.03635"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sparsity: float,
        total_steps: int,
        rounds: int = 11,
        rewind_to: int | str = 0,
        floor: int = 1,
        **options: Unpack[Options],
    ) -> None:
        if not isinstance(rounds, int) or rounds < 1:
            raise ValueError(f"rounds: expected an integer of at least 1, got {rounds!r}")
        if total_steps < rounds + 1:
            raise ValueError(
                f"total_steps: expected at least a step for each of {rounds + 1} trainings, got "
                f"{total_steps}"
            )
        self.rounds = rounds
        self.round_steps = total_steps // (rounds + 1)
        self.rewind_to = as_step(rewind_to, self.round_steps, "rewind_to")
        shapes = [tuple(layer.weight.shape) for layer in layers_of(unwrapped(model)).values()]
        layer_budgets(shapes, sparsity, "uniform", floor=floor)
        if options.get("init") != "from_zeros":
            active = [layer.count_active() for layer in layers_of(unwrapped(model)).values()]
            check_enough(active, shapes, sparsity)
        self._model = unwrapped(model)
        self._sparsity = sparsity
        self._floor = floor
        self._early: dict[str, Tensor] = {}
        every = self.round_steps
        super().__init__(
            model,
            optimizer,
            total_steps=total_steps,
            clock=UpdateClock(every=every, start=every, stop=every * rounds + 1),
            settings={
                "sparsity": sparsity,
                "rounds": rounds,
                "rewind_to": self.rewind_to,
                "floor": floor,
            },
            **options,
        )
        if self.rewind_to == 0:
            self._remember()
            if self.topology.place.is_whole:  # shards are of one weight
                self._replicas.send(list(self._early.values()))
        self.begin()

    def sparsity_at(self, step: int) -> float:
        return self._after(min(step // self.round_steps, self.rounds))

    @property
    def target_active(self) -> int:
        """Active weights at the end."""
        return active_budget(self._sparsity, self.numel)

    def step_of_round(self, step: int) -> int:
        """Steps since a step's round began, for learning rates; the last round takes what is left over."""
        return step - min(step // self.round_steps, self.rounds) * self.round_steps

    @property
    def is_final(self) -> bool:
        return self.steps > self.round_steps * self.rounds

    def step(self) -> bool:
        """Count the optimizer step that was just taken; at the end of a round prune and rewind."""
        is_update = super().step()
        if self.steps == self.rewind_to and not self._early:
            self._remember()
        return is_update

    def update(self, step: int) -> None:
        """Prune, and return to the early weights."""
        self.prune(
            active_budget(self._after(step // self.round_steps), self.numel), floor=self._floor
        )
        state = self._model.state_dict(keep_vars=True)
        for name, value in self._early.items():
            state[name].copy_(value)
        for parameter in self._model.parameters():
            self.topology.optimizer.state.pop(parameter, None)
        self.topology.settle()

    def method_state(self) -> dict[str, Any]:
        return {"early": dict(self._early)}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        self._early = {name: value.clone() for name, value in state["early"].items()}

    def _after(self, prunes: int) -> float:
        """Sparsity after so many prunes."""
        if prunes == self.rounds:
            return self._sparsity
        return 1 - float((1 - self._sparsity) ** (prunes / self.rounds))

    def _remember(self) -> None:
        """Everything of the model but its masks."""
        self._early = {
            name: value.detach().clone()
            for name, value in self._model.state_dict().items()
            if isinstance(value, Tensor) and not name.endswith("packed_mask")
        }
