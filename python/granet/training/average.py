"""An average of the weights over the steps (EMA), which is validated, tested and kept in their place."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from granet.engine import Sparsifier
from granet.methods import LotteryTicket
from granet.training.config import TrainConfig
from granet_kernels import MaskedSGD

STATISTICS_BATCHES = 64
"""Of the training images, that the average's batch norms are given; 4 thousand images and more."""


class AverageInSteps(AveragedModel):
    """Whose parameters MaskedSGD moves in each of its steps; an update counts the step.

    With an optimizer that has no such step: AveragedModel.

    Args:
        model, optimizer: of one list of parameters.
        decay: of the step behind so many others.
    """

    def __init__(
        self, model: nn.Module, optimizer: MaskedSGD, decay: Callable[[int], float]
    ) -> None:
        super().__init__(model)
        optimizer.average_into(self.parameters())

        def before_step(*_: object) -> None:
            steps = int(self.n_averaged)
            optimizer.average_decay = decay(steps) if steps else 0.0  # at first it is a copy

        optimizer.register_step_pre_hook(before_step)

    def update_parameters(self, model: nn.Module) -> None:
        """After a step: take the model's buffers, as every AveragedModel does."""
        for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
        self.n_averaged += 1


def build_average(
    config: TrainConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sparsifier: Sparsifier | None,
) -> AveragedModel | None:
    """The average of a model's parameters, which has the model's masks; None unless asked for.

    The decay rises to its value as (1 + n) / (10 + n) with the steps n, so that a short run does not
    end near its start.

    Raises:
        ValueError: the method goes back to earlier weights, which an average would not follow.
    """
    if not config.model_ema:
        return None
    if isinstance(sparsifier, LotteryTicket):
        raise ValueError(
            f"model_ema: expected a method that does not rewind weights, got {config.method}"
        )

    def decay(steps: int) -> float:
        return min(config.model_ema_decay, (1 + steps) / (10 + steps))

    def update(averages: Any, values: Any, _: object) -> None:
        steps = int(average.n_averaged)  # on the host, where what is handed in may be on the device
        get_ema_multi_avg_fn(decay(steps))(averages, values, steps)

    if isinstance(optimizer, MaskedSGD):
        average: AveragedModel = AverageInSteps(model, optimizer, decay)
    else:
        average = AveragedModel(model, multi_avg_fn=update)
    if sparsifier is not None:
        sparsifier.follow(average)
    return average


def measure_statistics(average: AveragedModel, images: Iterable[Tensor]) -> None:
    """Give the average's batch norms statistics of its own, which are not the model's.

    (With the model's, a ResNet that reaches 97 % classified 23 % right.) Random numbers that are drawn
    on the way, by dropout, are drawn for nobody.

    Args:
        average: whose network is changed, in its buffers alone.
        images: batches, on its device; the first `STATISTICS_BATCHES` are used.
    """
    device = next(average.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        update_bn(itertools.islice(images, STATISTICS_BATCHES), average.module)
