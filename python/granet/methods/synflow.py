"""SynFlow."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from granet.at_start import AtStart, Loss
from granet.engine import Options


class SynFlow(AtStart):
    """Iterative synaptic flow: keep the weights that carry the network's paths, without any data.

    In a copy whose parameters are their magnitudes and whose biases are zero, the score of a weight is
    ``weight * gradient`` of the summed outputs for an input of ones (Eq. 1). Pruning a little at a
    time, with new scores each time, keeps layers from collapsing.

    Args:
        rounds: prunes, each leaving the same share of the weights before it.

    The others, and the errors, are as in :class:`granet.at_start.AtStart`.
    """

    name = "synflow"
    source = "Tanaka et al., NeurIPS 2020, arXiv 2006.05467"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sparsity: float,
        total_steps: int,
        rounds: int = 100,
        floor: int = 1,
        **options: Unpack[Options],
    ) -> None:
        if not isinstance(rounds, int) or rounds < 1:
            raise ValueError(f"rounds: expected an integer of at least 1, got {rounds!r}")
        self._rounds = rounds
        super().__init__(
            model,
            optimizer,
            sparsity=sparsity,
            total_steps=total_steps,
            floor=floor,
            settings={"rounds": rounds},
            **options,
        )

    def select(self, batches: list[tuple[Tensor, Tensor]], loss: Loss) -> None:
        shape = batches[0][0].shape[1:]
        for done in range(1, self._rounds + 1):
            left = (1 - self._sparsity) ** (done / self._rounds)
            sparsity = self._sparsity if done == self._rounds else 1 - left
            self.keep(self._scores(shape), sparsity)

    def _scores(self, shape: torch.Size) -> dict[str, Tensor]:
        model, weights = self.copy()
        model.double().eval()  # products over many layers pass the largest float32
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name.endswith(("bias", "running_mean")):
                    tensor.zero_()  # a path that began here would not come from the input
                elif tensor.is_floating_point():
                    tensor.abs_()
        device = next(iter(weights.values())).device
        ones = torch.ones((1, *shape), dtype=torch.float64, device=device)
        model(ones).sum().backward()
        return {
            name: torch.zeros_like(weight) if weight.grad is None else weight.detach() * weight.grad
            for name, weight in weights.items()
        }
