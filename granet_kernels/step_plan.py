"""Who updates which parameters of a group in an optimizer's step, and what that follows from."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor


@dataclass(slots=True)
class Batch:
    """Parameters that one call updates, by their places in the group."""

    places: list[int] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    momenta: list[Tensor | None] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    """Packed; none of parameters that torch updates."""
    averages: list[Tensor] = field(default_factory=list)
    """That the call moves, too; of masked parameters."""

    def add(
        self,
        place: int,
        param: Tensor,
        momentum: Tensor | None,
        mask: Tensor | None = None,
        average: Tensor | None = None,
    ) -> None:
        self.places.append(place)
        self.params.append(param)
        self.momenta.append(momentum)
        if mask is not None:
            self.masks.append(mask)
        if average is not None:
            self.averages.append(average)

    def of(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """The gradients of its parameters, which all have one."""
        return [cast(Tensor, grads[place]) for place in self.places]

    def kept(self) -> list[Tensor]:
        """What a step reads and writes and the next one finds again."""
        momenta = [momentum for momentum in self.momenta if momentum is not None]
        return [*self.params, *momenta, *self.averages]


@dataclass(slots=True)
class Others:
    """Parameters whose averages no call of the operator moves: without a mask, or without a gradient."""

    params: list[Tensor] = field(default_factory=list)
    averages: list[Tensor] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)
    """Packed; None of parameters that have none."""

    def add(self, param: Tensor, average: Tensor, mask: Tensor | None) -> None:
        self.params.append(param)
        self.averages.append(average)
        self.masks.append(mask)

    def masked(self) -> tuple[list[Tensor], list[Tensor]]:
        """Averages of masked parameters, and the masks."""
        pairs = [(a, m) for a, m in zip(self.averages, self.masks, strict=True) if m is not None]
        return [average for average, _ in pairs], [mask for _, mask in pairs]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a plan follows from."""

    equal: tuple[Any, ...]
    same: list[Any]
    """By identity: tensors compare by their elements."""

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Facts)
            and self.equal == other.equal
            and len(self.same) == len(other.same)
            and all(map(operator.is_, self.same, other.same))
        )


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Who updates which parameters of a group, until anything changes that it follows from."""

    facts: Facts
    plain: list[Batch]
    """Torch's update."""
    masked: list[Batch]
    """The operator's, one call for each device and dtype."""
    masks: list[Tensor]
    """Of all `masked`, and of `others`."""
    others: Others

    def is_of(self, facts: Facts) -> bool:
        return self.facts == facts
