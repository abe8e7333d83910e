"""Where a run stands, and the means of the epoch under way: the loop's own state."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(kw_only=True, slots=True)
class Progress:
    """Where a run stands."""

    epoch: int = 0
    """Epochs finished."""
    batch: int = 0
    """Batches consumed in the epoch under way."""
    step: int = 0
    """Successful optimizer steps."""
    seconds: float = 0.0
    """Time spent so far, in this process and those before it."""
    best_epoch: int | None = None
    """Epoch of best.pt, from 1."""
    best_val_acc: float = -math.inf
    """Its validation accuracy in percent."""


class RunningMetrics:
    """Mean loss and accuracy over batches, summed on the device so that no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        # float64: counts stay exact, and so does the sum when a checkpoint interrupts the epoch.
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, outputs: Tensor, labels: Tensor) -> None:
        """Count a batch: `loss` is its mean, `outputs` (N, classes), `labels` (N,)."""
        count = len(labels)
        self.sums[0] += loss.detach() * count
        self.sums[1] += (outputs.argmax(1) == labels).sum()
        self.sums[2] += count

    def means(self) -> tuple[float, float]:
        """Loss, and accuracy in percent."""
        loss, correct, count = self.sums.tolist()
        return loss / count, 100 * correct / count
