"""What the callbacks share: a sparsifier that is made when training begins, and steps by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from granet.distributed import unwrapped, unwrapped_optimizer
from granet.engine import Sparsifier
from granet_kernels import masked_layers


class Keeper:
    """Makes a sparsifier once model, optimizer and length of the run are known.

    Attributes:
        sparsifier: None until training begins.
    """

    def __init__(self, method: Callable[..., Sparsifier], **options: Any) -> None:
        """
        Args:
            method: a method such as :class:`granet.GraNet`, or any function that makes a sparsifier
                from ``model``, ``optimizer`` and the keyword ``total_steps``.
            options: what else the method takes.
        """
        self.method = method
        self.options = options
        self.sparsifier: Sparsifier | None = None
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def make(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Make the sparsifier, which from here on is stepped by its optimizer.

        Args:
            model: as the run has loaded it, if it goes on from a checkpoint.
            optimizer: likewise.
            total_steps: length of the run in optimizer steps.
            state: the sparsifier's, of the same checkpoint; None where training begins.
        """
        self.let_go()
        if state is None:
            self.sparsifier = self.method(model, optimizer, total_steps=total_steps, **self.options)
        else:
            # Most methods start from masks of their own, which would zero what has been loaded.
            weights = [layer.weight for layer in masked_layers(unwrapped(model)).values()]
            values = [weight.detach().clone() for weight in weights]
            moments = copy.deepcopy(optimizer.state_dict())
            self.sparsifier = self.method(model, optimizer, total_steps=total_steps, **self.options)
            self.sparsifier.load_state_dict(state)
            with torch.no_grad():
                for weight, value in zip(weights, values, strict=True):
                    weight.copy_(value)
            optimizer.load_state_dict(moments)
        # Right after a step, because then gradients are there whatever the loop does with them, and
        # batches that only accumulate take none. It follows the sparsifier's own hook.
        real = unwrapped_optimizer(optimizer)
        self._hook = real.register_step_post_hook(self._step)

    def let_go(self) -> None:
        """Of the sparsifier of an earlier run."""
        if self.sparsifier is not None and self._hook is not None:
            self._hook.remove()
            self.sparsifier.remove()
        self.sparsifier = self._hook = None

    def _step(self, *_: Any) -> None:
        assert self.sparsifier is not None
        self.sparsifier.step()
