"""The masked layers of a model, and how their weights, masks and optimizer states change together.

Invariant, after whatever is done here: an inactive weight and every optimizer state of its shape are
+0.0. How regrown weights start is a policy of three names:

    keep        what the same update had dropped keeps value and state; all others start from zero
    zero        all start from zero, value and state
    layer_mean  values as with keep; states start from the mean over the layer's active weights

Under each of them a state that is nowhere negative (Adam's second moment, and its relatives) starts
from that mean rather than from zero: a zero would be taken for a gradient that was always tiny, and
the weight's first steps would be several times too long, for the optimizer's bias correction counts
its own steps and not the weight's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from granet.criteria import DROP
from granet.placement import Layer, Part
from granet.redistribution import REDISTRIBUTION, shares
from granet.sharded import placement_of
from granet_kernels import (
    MaskedSGD,
    count_active,
    drop_regrow_,
    pack_mask,
    prune_,
    prune_drop_regrow_,
    unpack_mask,
    zero_inactive_,
)

Regrown = Literal["keep", "zero", "layer_mean"]
MOMENTA = ("momentum_buffer", "exp_avg")
"""Names of first moments in the states of torch's optimizers, and of those that follow them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """How an update replaces connections within a sparsity."""

    drop: str = "magnitude"
    """A key of ``granet.criteria.DROP``."""
    redistribution: str = "none"
    """A key of ``granet.redistribution.REDISTRIBUTION``."""
    regrown: Regrown = "keep"
    """How regrown weights start."""

    def __post_init__(self) -> None:
        _check_choice("drop", self.drop, DROP)
        _check_choice("redistribution", self.redistribution, REDISTRIBUTION)
        _check_choice("regrown", self.regrown, get_args(Regrown))

    @property
    def is_fused(self) -> bool:
        """Whether the operators ``drop_regrow_`` and ``prune_drop_regrow_`` do all of it."""
        return (self.drop, self.redistribution, self.regrown) == ("magnitude", "none", "keep")


class Topology:
    """The masked layers of a model and the optimizer of their weights.

    Attributes:
        layers: by name; of layers that share a weight, the first.
        generator: of everything random.
        place: where the weights lie.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
    ) -> None:
        self.layers = dict(layers)
        self.optimizer = optimizer
        self.generator = generator
        self.place = placement_of(layers)

    @property
    def params(self) -> list[Tensor]:
        return [layer.weight for layer in self.layers.values()]

    @property
    def masks(self) -> list[Tensor]:
        """Packed, of whole weights: the ones that the layers use."""
        return [layer.bitmask.packed for layer in self.layers.values()]

    @property
    def parts(self) -> list[Part]:
        """Of all layers."""
        return self.place.parts(self.layers.values())

    def counts(self) -> list[int]:
        """Active weights of each layer. Waits for the device."""
        counts: list[int] = count_active(self.masks).tolist()
        return counts

    # Masks at the start

    def randomize(self, budgets: Sequence[int]) -> None:
        """Give each layer a random mask of exactly so many active weights."""
        for layer, budget in zip(self.layers.values(), budgets, strict=True):
            numel = layer.weight.numel()
            chosen = torch.randperm(numel, generator=self.generator)[:budget]
            mask = torch.zeros(numel, dtype=torch.bool).index_fill_(0, chosen, True)
            self._set_mask(layer, mask.view(layer.weight.shape))
        self.settle()

    def mask_zeros(self) -> None:
        """A weight that is zero becomes inactive: of a model that was sparse before it had masks."""
        self.place.publish(self.layers.values(), self.place.nonzero(self.parts))
        self.settle()

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Give layers these masks, bool in the shape of their weights."""
        for name, mask in masks.items():
            self._set_mask(self.layers[name], mask)
        self.settle()

    def _set_mask(self, layer: Layer, mask: Tensor) -> None:
        packed = layer.bitmask.packed
        packed.copy_(pack_mask(mask.to(packed.device), like=layer.weight))

    # What updates do

    def prune(self, k: int | Sequence[int], *, floor: int = 0) -> None:
        """Keep the ``k`` largest magnitudes over all layers, or so many in each.

        Args:
            k: how many stay.
            floor: with ``k`` over all layers, fewest that a layer keeps.
        """
        parts = self.parts
        weights, masks = [part.weight for part in parts], [part.mask for part in parts]
        k = self._above_floor(parts, k, floor)
        if not self.place.is_whole:
            self.place.publish(self.layers.values(), self.place.largest(weights, masks, k))
            self.settle()
            return
        momenta = self._fused_momenta(parts)
        prune_(weights, masks, k, momenta=momenta)
        self._zero_states(parts, masks, but=momenta)

    def _above_floor(
        self, parts: Sequence[Part], k: int | Sequence[int], floor: int
    ) -> int | Sequence[int]:
        """What a prune keeps: ``k``, or where a floor holds for all layers together, a count for each."""
        if floor == 0 or not isinstance(k, int):
            return k
        weights, masks = [part.weight for part in parts], [part.mask for part in parts]
        return self.place.counts_above_floor(weights, masks, k, floor)

    def keep(self, scores: Mapping[str, Tensor], k: int, *, floor: int = 0) -> None:
        """Keep the ``k`` active weights of largest ``|score|`` over all layers.

        Args:
            scores: by the layer's name, of what lies here of its weight, in that shape.
            k: how many stay.
            floor: fewest that a layer keeps.
        """
        parts = self.parts
        masks = [part.mask for part in parts]
        ranked = _laid_out([scores[name] for name in self.layers], parts)
        counts = self.place.counts_above_floor(ranked, masks, k, floor)
        self.place.publish(self.layers.values(), self.place.largest(ranked, masks, counts))
        self.settle()

    def exchange(
        self, fraction: float, scores: Mapping[str, Tensor], how: Exchange, *, floor: int = 0
    ) -> None:
        """In layers that have a score replace a share of the active weights by those of largest score.

        Args:
            fraction: of active weights that each layer drops, in [0, 1]; rounded up.
            scores: of growth, by the layer's name, of what lies here of its weight.
            how: the rest.
            floor: fewest active weights that redistribution leaves a layer.
        """
        layers = {name: layer for name, layer in self.layers.items() if name in scores}
        if not layers:
            return
        parts = self.place.parts(layers.values())
        ranked = _laid_out([scores[name] for name in layers], parts)
        if how.is_fused and self.place.is_whole:
            self._exchange_at_once(fraction, parts, ranked)
            return
        new, filled = self._exchange_apart(fraction, parts, ranked, how, floor)
        self.place.publish(layers.values(), new)
        self._start(parts, new, filled, how.regrown)

    def prune_and_exchange(
        self,
        k: int | Sequence[int],
        fraction: float,
        scores: Mapping[str, Tensor],
        how: Exchange,
        *,
        floors: tuple[int, int] = (0, 0),
    ) -> dict[str, Tensor]:
        """:meth:`prune`, then :meth:`exchange`; in one call of an operator where it does all of both.

        Args:
            floors: of the prune, and of the exchange. The other arguments are as there.

        Returns:
            Copies of the masks as pruning left them, by layer.
        """
        if how.is_fused and self.place.is_whole and self.layers.keys() <= scores.keys():
            parts = self.parts
            k = self._above_floor(parts, k, floors[0])
            ranked = _laid_out([scores[name] for name in self.layers], parts)
            pruned = self._exchange_at_once(fraction, parts, ranked, k)
        else:
            self.prune(k, floor=floors[0])
            pruned = [mask.clone() for mask in self.masks]
            self.exchange(fraction, scores, how, floor=floors[1])
        return dict(zip(self.layers, pruned, strict=True))

    def settle(self) -> None:
        """Restore the invariant, whatever wrote to weights and optimizer states."""
        parts = self.parts
        masks = [part.mask for part in parts]
        zero_inactive_([part.weight for part in parts], masks)
        self._zero_states(parts, masks)

    def momentum_of(self, param: Tensor) -> Tensor | None:
        """What lies here of the optimizer's first moment, in the weight's layout, if there is one."""
        if isinstance(self.optimizer, MaskedSGD):
            momentum = self.optimizer.momentum_of(param)
            return None if momentum is None else self.place.local(momentum)
        for name, state in self._states(param):
            if name in MOMENTA:
                return state
        return None

    # Parts of an exchange

    def _exchange_at_once(
        self,
        fraction: float,
        parts: Sequence[Part],
        ranked: Sequence[Tensor],
        k: int | Sequence[int] | None = None,
    ) -> list[Tensor]:
        """By one operator, which prunes first if there is a ``k``; returns the masks before the exchange."""
        weights, masks = [part.weight for part in parts], [part.mask for part in parts]
        momenta = self._fused_momenta(parts)
        if k is None:
            before = [mask.clone() for mask in masks]
            drop_regrow_(weights, masks, ranked, fraction, momenta=momenta)
        else:
            before = prune_drop_regrow_(weights, masks, ranked, k, fraction, momenta=momenta)
        # What was pruned may have regrown since: its states start from zero too.
        filled = [mask & old for mask, old in zip(masks, before, strict=True)]
        self._zero_states(parts, filled, but=momenta)
        self._start(parts, masks, filled, "keep")
        return before

    def _exchange_apart(
        self,
        fraction: float,
        parts: Sequence[Part],
        ranked: Sequence[Tensor],
        how: Exchange,
        floor: int,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """One step after another: masks to take, and what in them does not start anew; the rest is zero."""
        masks = [part.mask for part in parts]
        dropped = [math.ceil(fraction * count) for count in self.place.counts_of(masks)]
        kept = DROP[how.drop](self.place, parts, dropped, self.generator)
        new = self.place.grow(ranked, kept, self._growth(parts, kept, how, floor))
        base = kept if how.regrown == "zero" else masks
        filled = [mask & old for mask, old in zip(new, base, strict=True)]
        zero_inactive_([part.weight for part in parts], filled)
        self._zero_states(parts, filled)
        return new, filled

    def _growth(
        self, parts: Sequence[Part], kept: Sequence[Tensor], how: Exchange, floor: int
    ) -> list[int]:
        """How many weights each layer regrows."""
        active = self.place.counts_of([part.mask for part in parts])
        left = self.place.counts_of(kept)
        dropped = [old - new for old, new in zip(active, left, strict=True)]
        worth_of = REDISTRIBUTION[how.redistribution]
        if worth_of is None:
            return dropped
        own = [worth_of(part.weight, self.momentum_of(part.param)) for part in parts]
        worth = self.place.total(torch.stack(own)).tolist()
        owed = [max(min(floor, old) - new, 0) for old, new in zip(active, left, strict=True)]
        room = [
            part.param.numel() - new - due for part, new, due in zip(parts, left, owed, strict=True)
        ]
        shared = shares(sum(dropped) - sum(owed), worth, active, room)
        return [due + more for due, more in zip(owed, shared, strict=True)]

    def _start(
        self,
        parts: Sequence[Part],
        masks: Sequence[Tensor],
        filled: Sequence[Tensor],
        regrown: Regrown,
    ) -> None:
        """States of what is in ``masks`` but not in ``filled``, where the policy wants another value.

        Those states are zero. The others, of ``filled``, are what means are taken over.
        """
        if regrown != "layer_mean" and isinstance(self.optimizer, MaskedSGD):
            return  # its one state is a first moment
        for part, mask, old in zip(parts, masks, filled, strict=True):
            for name, state in self._states(part.param):
                others = unpack_mask(old, state.shape, like=part.weight)
                facts = torch.stack(
                    [state.double().sum(), others.double().sum(), (state < 0).double().sum()]
                )
                total, count, negative = self.place.total(facts).unbind()
                mean = total / count.clamp(min=1)
                if regrown != "layer_mean":
                    is_second_moment = negative == 0 if name not in MOMENTA else negative < 0
                    mean = torch.where(is_second_moment, mean, 0.0)
                grown = unpack_mask(mask & ~old, state.shape, like=part.weight)
                state.copy_(torch.where(grown, mean.to(state.dtype), state))

    # Optimizer states

    def _states(self, param: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What lies here of states of a weight's shape, by name, in the weight's memory layout."""
        states = self.optimizer.state.get(param, {})
        for name, state in list(states.items()):
            if not isinstance(state, Tensor) or state.shape != param.shape:
                continue
            if state.stride() != param.stride():  # a mask fits one layout only
                state = torch.empty_like(param, dtype=state.dtype).copy_(state)
                states[name] = state
            yield name, self.place.local(state)

    def _fused_momenta(self, parts: Sequence[Part]) -> list[Tensor] | None:
        """MaskedSGD's momenta, which the kernels handle in the pass that changes the mask."""
        if not isinstance(self.optimizer, MaskedSGD):
            return None
        momenta = [self.optimizer.momentum_of(part.param) for part in parts]
        present = [momentum for momentum in momenta if momentum is not None]
        return present if len(present) == len(parts) else None

    def _zero_states(
        self,
        parts: Sequence[Part],
        masks: Sequence[Tensor],
        but: Sequence[Tensor] | None = None,
    ) -> None:
        """Zero every optimizer state of a weight's shape where the weight is inactive."""
        done = {id(state) for state in but or ()}
        states, state_masks = [], []
        for part, mask in zip(parts, masks, strict=True):
            for _, state in self._states(part.param):
                if id(state) not in done:
                    states.append(state)
                    state_masks.append(mask)
        zero_inactive_(states, state_masks)


def _laid_out(scores: Sequence[Tensor], parts: Sequence[Part]) -> list[Tensor]:
    """Scores in the layouts of their weights, which packed masks are for."""
    return [
        score
        if score.stride() == part.weight.stride()
        else torch.empty_like(part.weight, dtype=score.dtype).copy_(score)
        for score, part in zip(scores, parts, strict=True)
    ]


def _check_choice(name: str, value: str, choices: object) -> None:
    known = list(choices)  # type: ignore[call-overload]
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
