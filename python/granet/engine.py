"""The engine that every method shares: when masks change, what for, resuming.

A method (``granet.methods``, a page each) says what an update does, with the engine's :meth:`prune`
and :meth:`exchange`. The engine counts successful optimizer steps, asks the layers for dense
gradients on the steps before an update and for those alone, and keeps inactive weights and their
optimizer state at zero whatever the optimizer is.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.hooks import RemovableHandle

from granet.distributed import Replicas, unwrapped, unwrapped_optimizer
from granet.followers import Follower
from granet.growth import Growth
from granet.mistakes import Pace, model_first
from granet.placement import Layer, layers_of
from granet.saved import check_equal, check_step, checked_engine, checked_masks
from granet.schedules import UpdateClock
from granet.settings import described
from granet.topology import Exchange, Topology
from granet_kernels import BitMask, MaskedConv2d, MaskedLinear, MaskedSGD

log = logging.getLogger("granet")

STATE_VERSION = 2
STATE_KEYS = {"version", "method", "settings", "steps", "masks", "generator", "engine"}


class Options(TypedDict, total=False):
    """What every method takes besides its own hyperparameters."""

    seed: int
    """Of everything random, masks at the start included; 0 by default."""
    init: Literal["masks", "from_zeros"]
    """Masks at the start: those that the layers have (the default), or of a model that was sparse
    before it had masks, inactive where a weight is zero. Random masks are drawn for dense models only."""
    process_group: ProcessGroup | None
    """Ranks that train this model; by default all of them where torch.distributed is running."""


@dataclass(frozen=True, eq=False, slots=True)
class MaskChange:
    """An update, as observers see it: packed masks by layer, to be read before the next step."""

    step: int
    before: Mapping[str, Tensor]
    pruned: Mapping[str, Tensor]
    """After pruning, before connections were exchanged."""
    after: Mapping[str, Tensor]


class Sparsifier(ABC):
    """Changes the masks of a model while it trains.

    A layer whose weight does not require gradients is pruned like any other, and drops and regrows nothing.
    Call :meth:`step` after every ``optimizer.step()`` and before ``zero_grad()``. Steps that an AMP
    scaler skipped are not counted.

    Attributes:
        layers: the masked layers by name; of layers that share a weight, the first.
        topology: what is done to them.
        steps: successful optimizer steps so far.
        total_steps: length of the run in steps.
        clock: which steps are updates.
        observers: called with a :class:`MaskChange` after every update.
    """

    name: ClassVar[str]
    """What ``granet train --method`` calls it."""
    source: ClassVar[str]
    """Where the method comes from."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in cls.__dict__:
            cls.__init__ = model_first(cls.__init__)  # type: ignore[method-assign]

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int,
        clock: UpdateClock,
        growth: str | None = None,
        settings: Mapping[str, Any],
        seed: int = 0,
        init: Literal["masks", "from_zeros"] = "masks",
        process_group: ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            growth: criterion by which connections grow; None for a method that grows none.
            settings: the method's hyperparameters, which a resumed run must share.

        The others are as in the class and in :class:`Options`.

        Raises:
            ValueError: a length that is no positive integer, an unknown ``init`` or ``growth``, a model
                without masked layers, or an optimizer without their weights.
        """
        if not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps: expected an integer of at least 1, got {total_steps!r}")
        if init not in ("masks", "from_zeros"):
            raise ValueError(f"init: expected 'masks' or 'from_zeros', got {init!r}")
        layers = layers_of(unwrapped(model))
        optimizer = unwrapped_optimizer(optimizer)
        self.growth = None if growth is None else Growth(growth)
        self.topology = Topology(layers, optimizer, torch.Generator().manual_seed(seed))
        self.total_steps = total_steps
        self.clock = clock
        self.steps = 0
        self.observers: list[Callable[[MaskChange], None]] = []
        self._sharers = [m for m in model.modules() if isinstance(m, MaskedConv2d | MaskedLinear)]
        self._settings = {"total_steps": total_steps, "clock": clock, **settings}
        self._replicas = Replicas.of(model, process_group)
        self._replicas.share_generator(self.topology)
        self._followers: list[Follower] = []
        self.frozen_at: int | None = None
        self._due: int | None = None
        self._updated = 0
        self._pace = Pace()
        self._pruned: dict[str, Tensor] | None = None
        self._asked_for_dense_gradient = False
        self._hook: RemovableHandle | None = None
        if init == "from_zeros":
            self.topology.mask_zeros()

    def begin(self) -> None:
        """The last line of a method's constructor, when the masks are as training starts."""
        self._replicas.share_masks(self.topology)
        self._set_dense_gradient(self._wants_gradients(1))  # a copied model may have other flags
        self._listen()

    def _listen(self) -> None:
        optimizer = self.topology.optimizer
        self._hook = optimizer.register_step_post_hook(self._after_optimizer_step)

    def remove(self) -> None:
        """Let go of the optimizer: steps are no longer counted, and masks no longer change."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
        self._set_dense_gradient(False)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(step {self.steps} of {self.total_steps}, sparsity "
            f"{self.sparsity:.4f}, {len(self.layers)} layers of {self.numel:,} weights)"
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_hook": self._hook is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of copies and pickles: copied optimizers have lost their hooks."""
        listens = state["_hook"]
        self.__dict__.update(state | {"_hook": None})
        if listens:
            self._listen()

    @property
    def layers(self) -> dict[str, Layer]:
        return self.topology.layers

    @property
    def sparsity(self) -> float:
        """The sparsity that the schedule has reached."""
        return self.sparsity_at(self.steps)

    @abstractmethod
    def sparsity_at(self, step: int) -> float:
        """The sparsity that the schedule has after a step."""

    @property
    def is_final(self) -> bool:
        """Whether the final sparsity is reached, and every active weight has been trained since.

        Right after an update those that regrew are zeros.
        """
        return self.steps != self._updated and self._due is None

    @abstractmethod
    def update(self, step: int) -> None:
        """Change the masks as is due at optimizer step ``step``."""

    @property
    def numel(self) -> int:
        """Weights of all masked layers."""
        return sum(weight.numel() for weight in self.topology.params)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Weight shapes of the masked layers."""
        return [tuple(weight.shape) for weight in self.topology.params]

    def active_counts(self) -> list[int]:
        """Active weights of each masked layer. Waits for the device."""
        return self.topology.counts()

    def step(self) -> bool:
        """Count the optimizer step that was just taken, and update the masks if it is time to.

        An update whose growth scores are not finite is postponed by a step, again and again until
        they are.

        Returns:
            Whether this was an update, after which masks may have changed.

        Raises:
            RuntimeError: it is time for an update, and the gradients are gone (nothing has changed);
                or ranks have come to different masks.
        """
        self._pace.call()
        if not self._pace.has_stepped:
            return False
        if self._wants_gradients(self.steps + 1):
            self._check_gradients()
        self._pace.has_stepped = False
        self.steps += 1
        due = self.steps if self._is_update(self.steps) else self._due
        if due is None or self._postpones(due):
            self._ask_for_dense_gradient()
            return False
        try:
            self._update(due)
        finally:
            self._ask_for_dense_gradient()
        return True

    def postponed_since(self, step: int) -> int:
        """For :meth:`update`: the earliest update that the one at ``step`` makes up for."""
        return step if self._due is None else min(self._due, step)

    def freeze(self) -> None:
        """No more updates: the masks stay as they are from here on. Part of the saved state."""
        self.frozen_at, self._due = self.steps, None
        self._ask_for_dense_gradient()

    def follow(self, model: nn.Module) -> None:
        """Let a copy of the model have the current masks: now, and after every update.

        For averages of the weights (EMA, SWA): the copy's own weights are set to zero where they are
        inactive, and stay what they are elsewhere. Not part of the saved state.

        Args:
            model: with the same masked layers, perhaps inside a wrapper such as ``AveragedModel``.

        Raises:
            ValueError: its masked layers are others.
        """
        follower = Follower(model, self.layers)
        follower.catch_up(self.layers)
        self._followers.append(follower)

    # What methods are made of

    def randomize(self, budgets: Sequence[int]) -> None:
        """Give each layer a random mask of exactly so many active weights."""
        self.topology.randomize(budgets)

    def prune(self, k: int | Sequence[int], *, floor: int = 0) -> None:
        """Keep the ``k`` largest magnitudes over all layers, none below ``floor``, or so many in each."""
        self.topology.prune(k, floor=floor)
        self._pruned = self.copy_of_masks()

    def exchange(self, fraction: float, how: Exchange, *, floor: int = 0) -> None:
        """In each layer replace a share of the active weights by those of largest growth score."""
        self.topology.exchange(fraction, self._growth_scores(), how, floor=floor)

    def prune_and_exchange(
        self, k: int | Sequence[int], fraction: float, how: Exchange, *, floors: tuple[int, int]
    ) -> None:
        """:meth:`prune`, then :meth:`exchange`, at once where that can be; ``floors`` are theirs."""
        self._pruned = self.topology.prune_and_exchange(
            k, fraction, self._growth_scores(), how, floors=floors
        )

    def _growth_scores(self) -> dict[str, Tensor]:
        assert self.growth is not None
        return self.growth.scores(self.layers, self.topology.place, self.topology.generator)

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Counters, masks in row-major order, random state, and the settings to compare when loading."""
        return {
            "version": STATE_VERSION,
            "method": self.name,
            "settings": described(self._settings),
            "steps": self.steps,
            "masks": {
                name: layer.bitmask.canonical().clone() for name, layer in self.layers.items()
            },
            "generator": self.topology.generator.get_state(),
            "engine": {
                "frozen_at": self.frozen_at,
                "due": self._due,
                "updated": self._updated,
                "growth": self.growth.state_dict() if self.growth else {},
                "method": self.method_state(),
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Make the sparsifier first, then load the model, the optimizer and this, in this order: making one
        may draw masks and set weights to zero.

        Raises:
            ValueError: it is of another method, other settings, other layers or shapes. Nothing has
                been changed then.
        """
        masks = self._checked_masks(state)
        engine = checked_engine(state["engine"], self.layers, self.growth is not None)
        self.load_method_state(engine["method"])
        generator = torch.Generator()
        generator.set_state(state["generator"])
        self.topology.set_masks({name: mask.to_bool() for name, mask in masks.items()})
        self.topology.generator = generator
        self.steps = state["steps"]
        self.frozen_at, self._due = engine["frozen_at"], engine["due"]
        self._updated = engine["updated"]
        if self.growth:
            self.growth.load_state_dict(engine["growth"], self.layers)
        self._pace.has_stepped = False
        self._replicas.check(self.topology)
        self._catch_up()
        if self._hook is not None:
            self._set_dense_gradient(self._wants_gradients(self.steps + 1))

    def method_state(self) -> dict[str, Any]:
        """What a method itself has to remember: nothing, unless it says so."""
        return {}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        """Give back what :meth:`method_state` gave."""
        if state:
            raise ValueError(f"state: expected nothing of {self.name}'s own, got {sorted(state)}")

    def _checked_masks(self, state: Mapping[str, Any]) -> dict[str, BitMask]:
        if missing := STATE_KEYS - state.keys():
            raise ValueError(
                f"state: expected what state_dict() gives, got none of {sorted(missing)}"
            )
        check_equal("version", state.get("version"), STATE_VERSION)
        check_equal("method", state.get("method"), self.name)
        for name, value in described(self._settings).items():
            check_equal(f"settings[{name!r}]", state["settings"].get(name), value)
        check_step("steps", state["steps"], self.total_steps)
        like = self.topology.generator.get_state()
        if not isinstance(state["generator"], Tensor) or state["generator"].shape != like.shape:
            raise ValueError("state: expected the generator's state, a uint8 tensor, got another")
        return checked_masks(state["masks"], self.layers)

    # An update

    def _update(self, due: int) -> None:
        before = self.copy_of_masks() if self.observers else {}
        self._pruned = None
        with torch.no_grad():
            self.update(due)
        self._due, self._updated = None, self.steps
        if self.growth:
            self.growth.forget()
        self.masks_changed(before, self._pruned or before)

    def masks_changed(self, before: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> None:
        """Compare the masks of all ranks, and tell those who follow and observe.

        Args:
            before, pruned: copies of the masks, as in :class:`MaskChange`.
        """
        self._replicas.check(self.topology)
        self._catch_up()
        if self.observers:
            change = MaskChange(self.steps, before, pruned, self.copy_of_masks())
            for observer in self.observers:
                observer(change)

    def _catch_up(self) -> None:
        for follower in self._followers:
            follower.catch_up(self.layers)

    def _postpones(self, due: int) -> bool:
        """Whether growth scores forbid the update that is due; then it is due at the next step."""
        if self.growth is None or self.growth.window == 0:
            return False
        scores = self._growth_scores().values()
        finite = [torch.isfinite(score).all() for score in scores]
        if self._replicas.all_true(finite):
            if not any(bool(score.any()) for score in scores):
                log.warning(
                    "step %d: all growth scores are zero; was zero_grad() called before step()?",
                    self.steps,
                )
            return False
        log.warning(
            "step %d: growth scores are not finite; the update of step %d waits for the next step",
            self.steps,
            due,
        )
        self.growth.forget()
        self._due = self.postponed_since(due)
        return True

    def copy_of_masks(self) -> dict[str, Tensor]:
        """Packed, by layer."""
        return {name: layer.bitmask.packed.clone() for name, layer in self.layers.items()}

    # Behind the scenes

    def _is_update(self, step: int) -> bool:
        return self.frozen_at is None and self.clock.is_update(step)

    def _wants_gradients(self, step: int) -> bool:
        """Whether the gradients of a step must be dense, and there."""
        window = 0 if self.growth is None else self.growth.window
        soon = any(self._is_update(step + ahead) for ahead in range(window))
        return soon or (window > 0 and self._due is not None)

    def _check_gradients(self) -> None:
        trained = [weight for weight in self.topology.params if weight.requires_grad]
        if trained and all(weight.grad is None for weight in trained):
            raise RuntimeError(
                "no layer has a gradient: call sparsifier.step() after backward(), before zero_grad()"
            )

    def _ask_for_dense_gradient(self) -> None:
        """A backward pass computes dense weight gradients only for the steps before an update."""
        wanted = self._wants_gradients(self.steps + 1)
        if wanted != self._asked_for_dense_gradient:
            self._set_dense_gradient(wanted)

    def _set_dense_gradient(self, wanted: bool) -> None:
        for layer in self._sharers:  # of a shared weight every layer adds to the gradient
            layer.dense_grad.fill_(wanted)
        self._asked_for_dense_gradient = wanted

    def _after_optimizer_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """A step with infinite gradients, which a GradScaler marks on the optimizer, was none."""
        found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        self._pace.step(found_inf is None or not bool(found_inf))
        if not self._pace.has_stepped:
            return
        with torch.no_grad():
            if not isinstance(optimizer, MaskedSGD) or not self.topology.place.is_whole:
                self.topology.settle()
            if self.growth and self._asked_for_dense_gradient:
                self.growth.observe(self.layers, getattr(optimizer, "grad_scale", None))
