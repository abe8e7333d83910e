"""The engine that every method shares: when masks change, on which tensors, resuming.

A method (``granet.methods``, a page each) says what an update does, with the engine's :meth:`prune`
and :meth:`drop_regrow`. The engine counts successful optimizer steps, asks the layers for dense
gradients on the step before an update and for that step alone, and keeps inactive weights and their
optimizer state at zero whatever the optimizer is.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from granet.schedules import UpdateClock
from granet_kernels import (
    BitMask,
    MaskedConv2d,
    MaskedLinear,
    MaskedSGD,
    count_active,
    drop_regrow_,
    masked_layers,
    prune_,
    zero_inactive_,
)

STATE_VERSION = 1
STATE_KEYS = {"version", "method", "settings", "steps", "masks", "generator"}


class Sparsifier(ABC):
    """Changes the masks of a model while it trains.

    Call :meth:`step` after every ``optimizer.step()`` and before ``zero_grad()``. Steps that an AMP
    scaler skipped are not counted.

    Attributes:
        layers: the masked layers by name; of layers that share a weight, the first.
        steps: successful optimizer steps so far.
        total_steps: length of the run in steps.
        clock: which steps are updates.
    """

    needs_dense_gradient: ClassVar[bool] = False
    """Whether an update reads the gradient of inactive weights."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int,
        clock: UpdateClock,
        settings: Mapping[str, Any],
        seed: int,
    ) -> None:
        """Args as in the class, and:

        settings: the method's hyperparameters, which a resumed run must share.
        seed: of everything random, masks at the start included.
        """
        self.layers = layers_of(model)
        _check_optimizer(optimizer, self.layers)
        self._sharers = [m for m in model.modules() if isinstance(m, MaskedConv2d | MaskedLinear)]
        self.total_steps = total_steps
        self.clock = clock
        self.steps = 0
        self._optimizer = optimizer
        self._settings = dict(settings)
        self._generator = torch.Generator().manual_seed(seed)
        self._stepped = False
        self._calls_without_a_step = 0
        self._asked_for_dense_gradient = False
        self._hook = optimizer.register_step_post_hook(self._after_optimizer_step)

    def remove(self) -> None:
        """Let go of the optimizer: steps are no longer counted, and masks no longer change."""
        self._hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_hook"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of copies and pickles: copied optimizers have lost their hooks."""
        self.__dict__.update(state)
        self._hook = self._optimizer.register_step_post_hook(self._after_optimizer_step)

    @property
    @abstractmethod
    def sparsity(self) -> float:
        """The sparsity that the schedule has reached."""

    @abstractmethod
    def update(self, step: int) -> None:
        """Change the masks after optimizer step ``step``."""

    @property
    def numel(self) -> int:
        """Weights of all masked layers."""
        return sum(layer.weight.numel() for layer in self.layers.values())

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Weight shapes of the masked layers."""
        return [tuple(layer.weight.shape) for layer in self.layers.values()]

    def active_counts(self) -> list[int]:
        """Active weights of each masked layer. Waits for the device."""
        counts: list[int] = count_active(
            [layer.packed_mask for layer in self.layers.values()]
        ).tolist()
        return counts

    def step(self) -> bool:
        """Count the optimizer step that was just taken, and update the masks if it is time to.

        Returns:
            Whether this was an update, after which masks may have changed.

        Raises:
            RuntimeError: it is time for an update, and the gradients are gone. Nothing has changed.
        """
        if not self._stepped:
            self._wonder_at_no_step()
            return False
        is_update = self.clock.is_update(self.steps + 1)
        if is_update and self.needs_dense_gradient:
            self._check_gradients()
        self._stepped = False
        self._calls_without_a_step = 0
        self.steps += 1
        if is_update:
            with torch.no_grad():
                self.update(self.steps)
        self._ask_for_dense_gradient()
        return is_update

    # What methods are made of

    def randomize(self, budgets: Sequence[int]) -> None:
        """Give each layer a random mask of exactly so many active weights."""
        for layer, budget in zip(self.layers.values(), budgets, strict=True):
            chosen = torch.randperm(layer.weight.numel(), generator=self._generator)[:budget]
            mask = torch.zeros(layer.weight.numel(), dtype=torch.bool).index_fill_(0, chosen, True)
            layer.mask = mask.view(layer.weight.shape)

    def prune(self, k: int | Sequence[int]) -> None:
        """Keep the ``k`` largest magnitudes over all layers, or so many in each."""
        weights, masks = self._weights_and_masks(self.layers.values())
        momenta = self._momenta(weights)
        prune_(weights, masks, k, momenta=momenta)
        self._zero_states(weights, masks, but=momenta)

    def regrow_score(self, layer: MaskedConv2d | MaskedLinear) -> Tensor | None:
        """What growth ranks by magnitude, in the weight's shape; None leaves the layer as it is.

        By default the gradient of this step: None for a layer that is frozen or was not used.
        """
        return layer.weight.grad

    def drop_regrow(self, drop_fraction: float) -> None:
        """In each layer replace a share of the active weights by those of largest score."""
        scored = [(layer, self.regrow_score(layer)) for layer in self.layers.values()]
        scored = [(layer, score) for layer, score in scored if score is not None]
        if not scored:
            return
        weights, masks = self._weights_and_masks(layer for layer, _ in scored)
        scores = [score for _, score in scored if score is not None]
        momenta = self._momenta(weights)
        drop_regrow_(weights, masks, scores, drop_fraction, momenta=momenta)
        self._zero_states(weights, masks, but=momenta)

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Counters, masks in row-major order, random state, and the settings to compare when loading."""
        return {
            "version": STATE_VERSION,
            "method": type(self).__name__,
            "settings": dict(self._settings),
            "steps": self.steps,
            "masks": {
                name: layer.bitmask.canonical().clone() for name, layer in self.layers.items()
            },
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken. The model and the optimizer are loaded first.

        Raises:
            ValueError: it is of another method, other settings, other layers or shapes. Nothing has
                been changed then.
        """
        masks = self._checked_masks(state)
        generator = torch.Generator()
        generator.set_state(state["generator"])
        for name, layer in self.layers.items():
            layer.mask = masks[name].to_bool()
        self.steps = state["steps"]
        self._generator = generator
        self._stepped = False
        self._ask_for_dense_gradient()

    def _checked_masks(self, state: Mapping[str, Any]) -> dict[str, BitMask]:
        if missing := STATE_KEYS - state.keys():
            raise ValueError(
                f"state: expected what state_dict() gives, got none of {sorted(missing)}"
            )
        _check_equal("method", state.get("method"), type(self).__name__)
        _check_equal("version", state.get("version"), STATE_VERSION)
        for name, value in self._settings.items():
            _check_equal(f"settings[{name!r}]", state["settings"].get(name), value)
        _check_equal("layers", list(state["masks"]), list(self.layers))
        steps, generator = state["steps"], state["generator"]
        if not isinstance(steps, int) or not 0 <= steps <= self.total_steps:
            raise ValueError(f"state: expected steps from 0 to {self.total_steps}, got {steps!r}")
        like = self._generator.get_state()
        if not isinstance(generator, Tensor) or generator.shape != like.shape:
            raise ValueError("state: expected the generator's state, a uint8 tensor, got another")
        masks = {}
        for name, layer in self.layers.items():
            try:
                masks[name] = BitMask.from_canonical(state["masks"][name], layer.weight.shape)
            except ValueError as error:
                raise ValueError(f"state: masks[{name!r}]: {error}") from None
        return masks

    # Behind the scenes

    def _check_gradients(self) -> None:
        if all(layer.weight.grad is None for layer in self.layers.values()):
            raise RuntimeError(
                "no layer has a gradient: call sparsifier.step() after backward(), before zero_grad()"
            )

    def _wonder_at_no_step(self) -> None:
        """A scaler may skip some steps in a row, but not so many."""
        self._calls_without_a_step += 1
        if self._calls_without_a_step == 100:
            warnings.warn(
                "sparsifier.step() was called 100 times in a row without a step of its optimizer: "
                "is another optimizer being stepped?",
                stacklevel=3,
            )

    def _ask_for_dense_gradient(self) -> None:
        """A backward pass computes dense weight gradients only for the step before an update."""
        wanted = self.needs_dense_gradient and self.clock.is_update(self.steps + 1)
        if wanted != self._asked_for_dense_gradient:
            for layer in self._sharers:  # of a shared weight every layer adds to the gradient
                layer.dense_grad.fill_(wanted)
            self._asked_for_dense_gradient = wanted

    def _after_optimizer_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """A step with infinite gradients, which a GradScaler marks on the optimizer, was none."""
        found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        self._stepped = found_inf is None or not bool(found_inf)
        if self._stepped and not isinstance(optimizer, MaskedSGD):
            weights, masks = self._weights_and_masks(self.layers.values())
            with torch.no_grad():
                zero_inactive_(weights, masks)
                self._zero_states(weights, masks)

    @staticmethod
    def _weights_and_masks(
        layers: Iterable[MaskedConv2d | MaskedLinear],
    ) -> tuple[list[Tensor], list[Tensor]]:
        pairs = [(layer.weight, layer.bitmask.packed) for layer in layers]
        return [weight for weight, _ in pairs], [mask for _, mask in pairs]

    def _momenta(self, weights: Sequence[Tensor]) -> list[Tensor] | None:
        """MaskedSGD's momentum, which the kernels handle in the pass that changes the mask."""
        if not isinstance(self._optimizer, MaskedSGD):
            return None
        momenta = [self._optimizer.momentum_of(weight) for weight in weights]
        present = [momentum for momentum in momenta if momentum is not None]
        return present if len(present) == len(weights) else None

    def _zero_states(
        self,
        weights: Sequence[Tensor],
        masks: Sequence[Tensor],
        but: Sequence[Tensor] | None = None,
    ) -> None:
        """Zero every optimizer state of a weight's shape where the weight is inactive."""
        done = {id(state) for state in but or ()}
        states, state_masks = [], []
        for weight, mask in zip(weights, masks, strict=True):
            for key, state in self._optimizer.state.get(weight, {}).items():
                if (
                    not isinstance(state, Tensor)
                    or state.shape != weight.shape
                    or id(state) in done
                ):
                    continue
                if state.stride() != weight.stride():  # a mask fits one layout only
                    state = torch.empty_like(weight, dtype=state.dtype).copy_(state)
                    self._optimizer.state[weight][key] = state
                states.append(state)
                state_masks.append(mask)
        zero_inactive_(states, state_masks)


def layers_of(model: nn.Module) -> dict[str, MaskedConv2d | MaskedLinear]:
    """The masked layers of a model; of layers that share a weight, the first.

    Raises:
        ValueError: there are none.
    """
    layers = masked_layers(model)
    if not layers:
        raise ValueError(
            "model: expected masked layers in it, got none; call granet_kernels.sparsify(model)"
        )
    return layers


def _check_optimizer(
    optimizer: torch.optim.Optimizer, layers: Mapping[str, MaskedConv2d | MaskedLinear]
) -> None:
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for name, layer in layers.items():
        if layer.weight.requires_grad and id(layer.weight) not in held:
            raise ValueError(
                f"optimizer: expected the parameters of model, got one without {name}.weight"
            )


def _check_equal(name: str, got: object, expected: object) -> None:
    if got != expected:
        raise ValueError(f"state: expected {name} {expected!r}, got {got!r}")
