"""Forward and backward passes as a configuration wants them: precision, memory format, accumulation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from granet.training import build
from granet.training.average import measure_statistics
from granet.training.config import TrainConfig
from granet.training.processes import Processes
from granet.training.progress import RunningMetrics

Batches = Iterable[tuple[Tensor, Tensor]]
"""Images and labels on the model's device."""
Seen = Callable[[Tensor, Tensor, Tensor], object]
"""Called with the loss, outputs and labels of every batch."""
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Makes of images and labels the images and class probabilities to train on."""


class Passes:
    """A network and the passes through it, in one process or as a part of several.

    Args:
        config: the run.
        model: the network that is trained.
        device: where it is.
        processes: those that train it together: each backward pass averages their gradients.
        average: the network to evaluate, if it is another.
        mix: applied to every training batch.
        trains: whether there will be backward passes.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        device: torch.device,
        *,
        processes: Processes = Processes(),  # noqa: B008 - it cannot change
        average: nn.Module | None = None,
        mix: Mix | None = None,
        trains: bool = True,
    ) -> None:
        self._config = config
        self._model = model
        self._device = device
        self._processes = processes
        self._mix = mix
        self._evaluated = model if average is None else average
        trained: nn.Module = model
        if processes.count > 1 and trains:
            trained = DistributedDataParallel(
                model, device_ids=[device] if device.type == "cuda" else None
            )
        self.forward = self._compiled(trained)
        # Not through DDP, which would wait for processes that have no batch left.
        self._forward_only = (
            self.forward if self._evaluated is trained else self._compiled(self._evaluated)
        )

    def step(
        self,
        batches: Batches,
        seen: Seen,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> bool:
        """An optimizer step from ``grad_accum_steps`` batches; gradients stay until they are zeroed.

        Returns:
            Whether there was one: float16's scaler skips those with infinite gradients.
        """
        config = self._config
        for number, (images, labels) in enumerate(batches, start=1):
            with self._sent_with_the_last(number == config.grad_accum_steps):
                inputs, targets = (
                    (images, labels) if self._mix is None else self._mix(images, labels)
                )
                with self._autocast():
                    outputs = self.forward(self._laid_out(inputs))
                    loss = F.cross_entropy(outputs, targets, label_smoothing=config.smoothing)
                scaler.scale(loss / config.grad_accum_steps).backward()
            seen(loss, outputs, labels)
        if config.clip_grad is not None:
            scaler.unscale_(optimizer)
            build.clip_gradients(self._model, config.clip_grad)
        return build.step_optimizer(scaler, optimizer)

    def evaluate(
        self, batches: Batches, after_batch: Callable[[], object] = lambda: None
    ) -> tuple[float, float]:
        """Mean cross-entropy, and accuracy in percent, in evaluation mode, over all processes."""
        metrics = RunningMetrics(self._device)
        self._evaluated.eval()
        self._processes.share_buffers(self._evaluated)
        with torch.no_grad():
            for images, labels in batches:
                with self._autocast():
                    outputs = self._forward_only(self._laid_out(images))
                    loss = F.cross_entropy(outputs, labels)
                metrics.add(loss, outputs, labels)
                after_batch()
        self._processes.add(metrics.sums)
        return metrics.means()

    def measure_statistics(self, average: AveragedModel, batches: Batches) -> None:
        """Give the batch norms of an average of the network statistics of its own."""
        with self._autocast():
            measure_statistics(average, (self._laid_out(images) for images, _ in batches))

    def _compiled(self, network: nn.Module) -> Callable[..., Any]:
        return torch.compile(network) if self._config.torchcompile else network

    def _sent_with_the_last(self, is_last: bool) -> AbstractContextManager[Any]:
        """Of gradients that add up, processes send each other the sums only."""
        if self._processes.count == 1 or is_last:
            return nullcontext()
        return self.forward.no_sync()  # type: ignore[attr-defined, no-any-return]

    def _autocast(self) -> AbstractContextManager[Any]:
        if not self._config.amp:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=getattr(torch, self._config.amp_dtype))

    def _laid_out(self, images: Tensor) -> Tensor:
        return images.to(memory_format=build.memory_format(self._config))
