"""ResNet-50's weights between backward and step, in the state that sparse training leaves them in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.resnet50 import RESNET50, Size, kaiming_weights, weight_shapes
from granet_kernels import attach_mask, pack_mask

CPU = torch.device("cpu")
# A quarter of the width: a sixteenth of the weights, 1.6 million of them.
QUICK_SIZE = Size(width=16)


@dataclass(frozen=True, kw_only=True, eq=False)
class Tensors:
    """Lists in the same order; a weight is +0.0 where its mask is False."""

    weights: list[Tensor]
    grads: list[Tensor]
    masks: list[Tensor]
    """bool."""

    @property
    def numel(self) -> int:
        return sum(weight.numel() for weight in self.weights)

    def packed(self) -> list[Tensor]:
        """Fresh packed masks."""
        return [pack_mask(mask) for mask in self.masks]

    def momenta(self) -> list[Tensor]:
        """Fresh ones, zero where a weight is inactive."""
        return [grad * mask for grad, mask in zip(self.grads, self.masks, strict=True)]

    def parameters(self, *, masked: bool) -> list[nn.Parameter]:
        """Copies as parameters with gradients; where `masked`, with their mask attached."""
        params = []
        for weight, grad, packed in zip(self.weights, self.grads, self.packed(), strict=True):
            param = nn.Parameter(weight.clone())
            param.grad = grad
            if masked:
                attach_mask(param, packed)
            params.append(param)
        return params


def make_tensors(sparsity: float, *, quick: bool = False) -> Tensors:
    """Kaiming weights under random masks, normal gradients: numbers of ordinary size, none denormal."""
    size = QUICK_SIZE if quick else RESNET50
    g = torch.Generator().manual_seed(2)
    weights = kaiming_weights(weight_shapes(size), CPU, seed=0)
    masks = [torch.rand(weight.shape, generator=g) >= sparsity for weight in weights]
    for weight, mask in zip(weights, masks, strict=True):
        weight.masked_fill_(~mask, 0.0)
    grads = [torch.randn(weight.shape, generator=g) * 1e-3 for weight in weights]
    return Tensors(weights=weights, grads=grads, masks=masks)
