"""What the rows of our operators share: the network's tensors under packed masks, and who computes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bench.registry import Setting
from bench.resnet50 import kaiming_weights, weight_shapes

Backend = Literal["cuda", "triton"]
Distribution = Literal["uniform", "erk"]

BACKENDS: tuple[Backend, ...] = ("cuda", "triton")


@dataclass(frozen=True, kw_only=True, slots=True)
class Masked:
    """The network's weights between backward and step; +0.0 where the mask is 0, momenta too."""

    weights: list[Tensor]
    grads: list[Tensor]
    momenta: list[Tensor]
    masks: list[Tensor]
    """Packed."""

    @property
    def numel(self) -> int:
        """Of all weights."""
        return sum(weight.numel() for weight in self.weights)


def computed_by(
    backend: Backend, setting: Setting, *operators: str
) -> Callable[[], AbstractContextManager[None]]:
    """`Case.around` of a row whose operators this backend computes; on a CPU whoever is the default there.

    Raises:
        RuntimeError: another one would: a row of a slower backend under this name would be a lie.
    """
    from granet_kernels.ops import backend_for, use_backend

    if setting.device.type != "cuda":
        return nullcontext
    with use_backend(backend):
        for operator in operators:
            found = backend_for(operator, "cuda")
            if found != backend:
                raise RuntimeError(f"{operator}: expected the {backend} backend, got {found}")
    return functools.partial(use_backend, backend)


def random_masks(
    shapes: list[tuple[int, ...]], sparsity: float, distribution: Distribution, setting: Setting
) -> list[Tensor]:
    """bool, each weight by itself; the layers' fractions as the distribution has them."""
    from granet.distributions import layer_budgets

    generator = torch.Generator(setting.device).manual_seed(setting.seed + 1)
    masks = [torch.rand(shape, device=setting.device, generator=generator) for shape in shapes]
    budgets = layer_budgets(shapes, sparsity, distribution)
    return [mask < budget / mask.numel() for mask, budget in zip(masks, budgets, strict=True)]


def make_masked(
    sparsity: float,
    distribution: Distribution,
    setting: Setting,
    dtype: torch.dtype = torch.float32,
) -> Masked:
    """Kaiming weights, normal gradients and momenta."""
    shapes = weight_shapes(setting.size)
    weights = kaiming_weights(shapes, setting.device, setting.seed)
    masks = random_masks(shapes, sparsity, distribution, setting)
    return masked_tensors([weight.to(dtype) for weight in weights], masks)


def masked_tensors(weights: list[Tensor], masks: list[Tensor]) -> Masked:
    """The weights under bool masks, with normal gradients and momenta."""
    from granet_kernels import pack_mask

    grads = [torch.randn_like(weight) * 1e-3 for weight in weights]
    momenta = [torch.randn_like(weight) * 1e-3 for weight in weights]
    for tensors in (weights, momenta):
        for tensor, mask in zip(tensors, masks, strict=True):
            tensor.masked_fill_(~mask, 0.0)
    packed = [pack_mask(mask) for mask in masks]
    return Masked(weights=weights, grads=grads, momenta=momenta, masks=packed)
