"""Forward and backward passes as a configuration wants them: precision, memory format, accumulation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from granet import build
from granet.config import TrainConfig
from granet.progress import RunningMetrics

Batches = Iterable[tuple[Tensor, Tensor]]
"""Images and labels on the model's device."""
Seen = Callable[[Tensor, Tensor, Tensor], object]
"""Called with the loss, outputs and labels of every batch."""


class Passes:
    """A network, its optimizer, and the passes between them.

    Attributes:
        forward: the network, compiled where the configuration says so.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        device: torch.device,
    ) -> None:
        self._config = config
        self._model = model
        self._optimizer = optimizer
        self._scaler = scaler
        self._device = device
        self.forward: Callable[[Tensor], Tensor] = (
            torch.compile(model) if config.torchcompile else model
        )

    def step(self, batches: Batches, seen: Seen) -> bool:
        """An optimizer step from ``grad_accum_steps`` batches; gradients stay until they are zeroed.

        Returns:
            Whether there was one: float16's scaler skips those with infinite gradients.
        """
        config = self._config
        for images, labels in batches:
            with self._autocast():
                outputs = self.forward(self._laid_out(images))
                loss = F.cross_entropy(outputs, labels, label_smoothing=config.smoothing)
            self._scaler.scale(loss / config.grad_accum_steps).backward()
            seen(loss, outputs, labels)
        if config.clip_grad is not None:
            self._scaler.unscale_(self._optimizer)
            build.clip_gradients(self._model, config.clip_grad)
        return build.step_optimizer(self._scaler, self._optimizer)

    def evaluate(
        self, batches: Batches, after_batch: Callable[[], object] = lambda: None
    ) -> tuple[float, float]:
        """Mean cross-entropy, and accuracy in percent, in evaluation mode."""
        metrics = RunningMetrics(self._device)
        self._model.eval()
        with torch.no_grad():
            for images, labels in batches:
                with self._autocast():
                    outputs = self.forward(self._laid_out(images))
                    loss = F.cross_entropy(outputs, labels)
                metrics.add(loss, outputs, labels)
                after_batch()
        return metrics.means()

    def _autocast(self) -> AbstractContextManager[Any]:
        if not self._config.amp:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=getattr(torch, self._config.amp_dtype))

    def _laid_out(self, images: Tensor) -> Tensor:
        return images.to(memory_format=build.memory_format(self._config))
