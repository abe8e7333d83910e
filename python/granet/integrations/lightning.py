"""Sparse training with Lightning's ``Trainer``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from granet.integrations.keeper import Keeper

try:
    from lightning.pytorch import Callback
except ImportError:  # the same library by its older name
    from pytorch_lightning import Callback


class SparsifierCallback(Keeper, Callback):
    """Trains a LightningModule sparsely: ``callbacks=[SparsifierCallback(GraNet, sparsity=0.9)]``.

    The module has masked layers already (``granet_kernels.sparsify``), and one optimizer. Lightning
    keeps the sparsifier's state in its checkpoints, and a run that goes on from one gives the same bits.
    """

    _loaded: Mapping[str, Any] | None = None

    def setup(self, *_: Any, **__: Any) -> None:
        """Before Lightning loads a checkpoint, if it does."""
        self._loaded = None

    def on_train_start(self, trainer: Any, _: Any) -> None:
        """Make the sparsifier; model and optimizer have been loaded if the run goes on.

        Raises:
            ValueError: there is not exactly one optimizer, or no end of training.
        """
        optimizers, steps = trainer.optimizers, trainer.estimated_stepping_batches
        if len(optimizers) != 1:
            raise ValueError(f"trainer: expected one optimizer, got {len(optimizers)}")
        if not 0 < steps < math.inf:
            raise ValueError(
                f"trainer: expected an end, max_epochs or max_steps, got {steps} steps"
            )
        self.make(trainer.model, optimizers[0], int(steps), self._loaded)

    def state_dict(self) -> dict[str, Any]:
        """The sparsifier's; empty before there is one."""
        return self.sparsifier.state_dict() if self.sparsifier else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep it until training starts."""
        self._loaded = state
