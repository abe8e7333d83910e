"""Methods that prune once, before training, by scores that data or the network's own paths give."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from granet.counts import check_enough
from granet.distributed import unwrapped
from granet.distributions import active_budget, layer_budgets
from granet.engine import Options, Sparsifier
from granet.placement import layers_of
from granet.schedules import never
from granet.sharded import placement_of
from granet_kernels import densify

Batches = Iterable[tuple[Tensor, Tensor]]
"""Inputs and targets."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""A scalar from outputs and targets."""


class AtStart(Sparsifier):
    """Prunes when :meth:`start` is called; after that masks stay.

    Scores are computed on a dense copy of the model: the model's own gradients, statistics and
    buffers are left alone. Ranks that train together add up their scores, each from its own
    batches.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sparsity: float,
        total_steps: int,
        floor: int = 1,
        settings: Mapping[str, Any] | None = None,
        **options: Unpack[Options],
    ) -> None:
        """Args as in :class:`granet.GraNet`.

        Raises:
            ValueError: a sparsity that would leave a layer fewer weights than ``floor``.
        """
        layers = layers_of(unwrapped(model))
        if not placement_of(layers).is_whole:
            raise ValueError(
                f"model: {self.name} prunes a dense copy of it, so expected whole weights, got shards; "
                "prune before fully_shard, and train on with OneShot(prune_at=0), which keeps the masks"
            )
        shapes = [tuple(layer.weight.shape) for layer in layers.values()]
        layer_budgets(shapes, sparsity, "uniform", floor=floor)
        if options.get("init") != "from_zeros":
            check_enough([layer.count_active() for layer in layers.values()], shapes, sparsity)
        self._model = unwrapped(model)
        self._sparsity = sparsity
        self._floor = floor
        self._started = False
        own = {"sparsity": sparsity, "floor": floor, **(settings or {})}
        super().__init__(
            model, optimizer, total_steps=total_steps, clock=never(), settings=own, **options
        )
        self.begin()

    def start(self, batches: Batches, loss: Loss = F.cross_entropy) -> None:
        """Prune to the sparsity. Call it once, before the first step.

        Args:
            batches: inputs and targets as in training, on the model's device: one batch is enough,
                of several the scores are summed.
            loss: of outputs and targets, a mean over the batch.

        Raises:
            RuntimeError: it has been called before, or training has begun.
            ValueError: ``batches`` is empty.
        """
        if self._started or self.steps:
            raise RuntimeError("start() was called after training had begun, or a second time")
        batches = list(batches)
        if not batches:
            raise ValueError("batches: expected at least one batch, got none")
        before = self.copy_of_masks()
        self.select(batches, loss)
        self._started = True
        self.masks_changed(before, before)

    @abstractmethod
    def select(self, batches: list[tuple[Tensor, Tensor]], loss: Loss) -> None:
        """Change the masks: with :meth:`copy`, :meth:`keep` and scores."""

    def step(self) -> bool:
        """Count the optimizer step that was just taken; nothing changes any more."""
        if not self._started:
            raise RuntimeError(f"{type(self).__name__}: call start() before the first step")
        return super().step()

    def sparsity_at(self, step: int) -> float:
        return self._sparsity if self._started else 0.0

    @property
    def is_final(self) -> bool:
        return self._started and super().is_final

    @property
    def target_active(self) -> int:
        """Active weights after the prune."""
        return active_budget(self._sparsity, self.numel)

    def update(self, step: int) -> None:
        raise AssertionError("the clock of masks that stay has no update")

    # For methods

    def copy(self) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        """A dense copy of the model, inactive weights zero, and the masked weights in it by name."""
        dense = densify(self._model)
        for parameter in dense.parameters():
            parameter.grad = None
        weights = {}
        for name in self.layers:
            weight = dense.get_submodule(name).weight
            assert isinstance(weight, nn.Parameter)
            weights[name] = weight
            weight.requires_grad_()
        return dense, weights

    def keep(self, scores: Mapping[str, Tensor], sparsity: float) -> None:
        """Keep what ``sparsity`` leaves of the weights, those of largest ``|score|``."""
        self._replicas.add(list(scores.values()))
        self.check_finite(scores)
        self.topology.keep(scores, active_budget(sparsity, self.numel), floor=self._floor)

    def check_finite(self, scores: Mapping[str, Tensor]) -> None:
        """Raise RuntimeError, before any mask changes, where a score is NaN or infinite."""
        bad = [name for name, score in scores.items() if not bool(torch.isfinite(score).all())]
        if bad:
            raise RuntimeError(
                f"{self.name}: scores of {', '.join(bad[:4])}{' and others' if len(bad) > 4 else ''} are "
                "not finite: are the batches, the weights and the loss?"
            )

    def method_state(self) -> dict[str, Any]:
        return {"started": self._started}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        self._started = bool(state["started"])
