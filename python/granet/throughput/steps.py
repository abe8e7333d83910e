"""What `granet bench` times: training and inference steps of a network, dense and sparse.

- dense: training with torch.optim.SGD, fused, with momentum; inference with batch norms folded into the
  convolutions before them
- masked: random masks; training with MaskedSGD; inference of the masked network as it is
- compressed: inference of ``granet_kernels.compress(masked)``, on a CPU
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from granet.distributions import layer_budgets
from granet.models import create_model
from granet.topology import Topology
from granet_kernels import MaskedSGD, compress, masked_layers, sparsify

Mode = Literal["training", "inference"]
SGD = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What is measured, but for the sparsity."""

    model: str
    device: torch.device
    num_classes: int = 10
    sample_shape: tuple[int, ...] = (3, 32, 32)
    """Channels, height, width."""
    batch_size: int = 64
    dtype: torch.dtype = torch.float32
    """Of weights and images."""
    amp_dtype: torch.dtype | None = None
    """That autocast computes in; None without it."""
    channels_last: bool = False
    torchcompile: bool = False
    distribution: str = "erk"
    seed: int = 0

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of convolutions and linear layers."""
        return self.amp_dtype or self.dtype

    def autocast(self) -> AbstractContextManager[Any]:
        """What a forward pass runs in."""
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)


def make_batch(setting: Setting) -> tuple[Tensor, Tensor]:
    """Noise and random labels, the same for every network."""
    generator = torch.Generator().manual_seed(setting.seed)
    shape = (setting.batch_size, *setting.sample_shape)
    images = torch.randn(shape, generator=generator).to(setting.device, setting.dtype)
    labels = torch.randint(setting.num_classes, shape[:1], generator=generator)
    return images.contiguous(memory_format=_layout(setting)), labels.to(setting.device)


def _layout(setting: Setting) -> torch.memory_format:
    return torch.channels_last if setting.channels_last else torch.contiguous_format


def make_network(setting: Setting, network: str, sparsity: float) -> nn.Module:
    """`dense`, or with random masks, the same weights in each."""
    torch.manual_seed(setting.seed)
    model = create_model(
        setting.model, num_classes=setting.num_classes, in_channels=setting.sample_shape[0]
    )
    model = model.to(setting.device, setting.dtype).to(memory_format=_layout(setting))
    if network != "dense":
        mask_randomly(sparsify(model), sparsity, setting.distribution, setting.seed)
    return model


def mask_randomly(model: nn.Module, sparsity: float, distribution: str, seed: int) -> None:
    """Give the masked layers of a model random masks, in place.

    Args:
        model: with masked layers.
        sparsity: fraction of their weights that is to be inactive, in [0, 1).
        distribution: key of `granet.distributions.DISTRIBUTIONS`.
        seed: of the masks.

    Raises:
        ValueError: the layers cannot meet `sparsity`, or no distribution has that name.
    """
    layers = masked_layers(model)
    shapes = [tuple(layer.weight.shape) for layer in layers.values()]
    budgets = layer_budgets(shapes, sparsity, distribution)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # has no state that masks concern
    Topology(layers, optimizer, torch.Generator().manual_seed(seed)).randomize(budgets)


def training_step(
    setting: Setting, model: nn.Module, network: str, batch: tuple[Tensor, Tensor]
) -> Callable[[], None]:
    """Forward, backward, optimizer step, gradients gone; with float16 autocast a loss scaler."""
    images, labels = batch
    kind = torch.optim.SGD if network == "dense" else MaskedSGD
    optimizer = kind(model.train().parameters(), fused=True, **SGD)  # type: ignore[arg-type]
    scaler = torch.amp.GradScaler(setting.device.type, enabled=setting.amp_dtype == torch.float16)
    call = torch.compile(model) if setting.torchcompile else model

    def step() -> None:
        with setting.autocast():
            loss = F.cross_entropy(call(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def inference_step(
    setting: Setting, model: nn.Module, network: str, batch: tuple[Tensor, Tensor]
) -> Callable[[], None]:
    """Forward, without gradients."""
    images, _ = batch
    model.eval()
    if network == "dense":
        model = _folded(model)
    elif network == "compressed":
        model = compress(model)
    call = torch.compile(model) if setting.torchcompile else model

    def step() -> None:
        with torch.inference_mode(), setting.autocast():
            call(images)

    return step


def _folded(model: nn.Module) -> nn.Module:
    """With batch norms folded into the convolutions before them; as it is where torch.fx cannot trace it."""
    try:
        folded: nn.Module = fuse(model)
    except Exception:  # of the model's own code, given proxies: it may raise anything
        return model
    return folded
