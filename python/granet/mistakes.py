"""What is most often forgotten around a sparsifier, and where one is told."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from granet.distributed import unwrapped, unwrapped_optimizer
from granet.placement import check_optimizer, layers_of

PATIENCE = 100
"""Steps or calls in a row without the other: a scaler may skip some steps, but not so many."""


class Pace:
    """Whether an optimizer's steps and a sparsifier's calls keep pace with each other.

    Attributes:
        has_stepped: whether a successful step was taken since the last one was counted.
    """

    def __init__(self) -> None:
        self.has_stepped = False
        self._steps = 0
        self._calls = 0

    def step(self, succeeded: bool) -> None:
        """The optimizer has taken a step, or a scaler has skipped it."""
        self.has_stepped = succeeded
        self._steps += succeeded
        if self._steps == PATIENCE:
            warnings.warn(
                f"the optimizer has taken {PATIENCE} steps without a call of sparsifier.step(): masks "
                "change there alone",
                stacklevel=5,
            )

    def call(self) -> None:
        """The sparsifier was asked to count a step."""
        self._steps = 0
        if self.has_stepped:
            self._calls = 0
            return
        self._calls += 1
        if self._calls == PATIENCE:
            warnings.warn(
                f"sparsifier.step() was called {PATIENCE} times in a row without a step of its optimizer: "
                "is another optimizer being stepped?",
                stacklevel=3,
            )


def model_first(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that looks at model and optimizer before at schedules: there most mistakes are made."""

    @functools.wraps(init)
    def checked(
        self: object,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        check_optimizer(unwrapped_optimizer(optimizer), layers_of(unwrapped(model)))
        init(self, model, optimizer, *args, **kwargs)

    return checked
