"""The network of a run as its checkpoint has it: layers, bytes, and small pictures of its masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from granet.training.checkpoint import Checkpoint
from granet.training.runs import weights_in

PICTURES = 6
"""Of a network: its first layers, and the last two."""
SHOWN, SHOWN_LINEAR = 12, 48
"""Output channels shown of a layer, and as many input channels of each."""
LEVELS = 7
"""Of magnitude, for each sign."""
BETWEEN = LEVELS + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerAtEnd:
    """A convolution or linear layer."""

    name: str
    shape: tuple[int, ...]
    weights: int
    active: int
    dense_flops: int
    """Of one image's forward pass."""
    dead_channels: int
    """Output channels without an active weight."""

    @property
    def share(self) -> float:
        """Of its weights, active."""
        return self.active / self.weights

    @property
    def flops(self) -> float:
        """Of active weights."""
        return self.dense_flops * self.share


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskPicture:
    """A layer's output channels in columns, its input channels in rows, a line of pixels between kernels."""

    layer: LayerAtEnd
    levels: Tensor
    """(height, width) int8: 0 is inactive, BETWEEN lies between kernels; else the sign, and the magnitude
    up to LEVELS."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """What a checkpoint says of its network."""

    layers: tuple[LayerAtEnd, ...]
    pictures: tuple[MaskPicture, ...]
    """None of a dense network."""
    dense_bytes: int
    """Of all weights of the layers."""
    active_bytes: int
    """Of active weights, with a bit for each weight of a masked layer."""


def read_network(checkpoint: Checkpoint) -> Network:
    """The network of a checkpoint: the average of the weights, where there is one."""
    flops: Mapping[str, int] = checkpoint.entries["flops"]["dense"]
    layers, masked = [], []
    dense_bytes = active_bytes = 0
    for name, weight, mask in weights_in(checkpoint.network):
        layer = LayerAtEnd(
            name=name or "(the model)",
            shape=tuple(weight.shape),
            weights=weight.numel(),
            active=weight.numel() if mask is None else int(mask.sum()),
            dense_flops=flops.get(name, 0),
            dead_channels=0 if mask is None else int((~mask.flatten(1).any(1)).sum()),
        )
        layers.append(layer)
        dense_bytes += weight.nbytes
        active_bytes += layer.active * weight.element_size()
        if mask is not None:
            masked.append((layer, weight, mask))
            active_bytes += (weight.numel() + 7) // 8
    convolutions = [entry for entry in masked if entry[1].dim() > 2]
    return Network(
        layers=tuple(layers),
        pictures=tuple(mask_picture(*entry) for entry in _chosen(convolutions or masked)),
        dense_bytes=dense_bytes,
        active_bytes=active_bytes,
    )


def _chosen(entries: list[Any]) -> list[Any]:
    if len(entries) <= PICTURES:
        return entries
    return [*entries[: PICTURES - 2], *entries[-2:]]


def mask_picture(layer: LayerAtEnd, weight: Tensor, mask: Tensor) -> MaskPicture:
    """The first channels of a layer; magnitudes are relative to the largest of those shown."""
    shown = SHOWN if weight.dim() > 2 else SHOWN_LINEAR
    weight, mask = weight[:shown, :shown].float(), mask[:shown, :shown]
    magnitude = weight.abs().nan_to_num(nan=torch.inf)
    finite = magnitude[magnitude.isfinite() & mask]
    largest = float(finite.max()) if finite.numel() else 0.0
    # The square root, because few weights are anywhere near the largest.
    relative = (magnitude / largest).clamp(max=1).sqrt() if largest else torch.ones_like(magnitude)
    levels = (relative * LEVELS).ceil().clamp(1, LEVELS) * (1 - 2 * weight.signbit().float())
    return MaskPicture(
        layer=layer,
        levels=_side_by_side((levels * mask).to(torch.int8)),
    )


def _side_by_side(levels: Tensor) -> Tensor:
    """(outputs, inputs, ...) as a picture; where kernels are single weights, nothing lies between them."""
    height, width = (1, 1, *levels.shape[2:])[-2:]
    if (height, width) == (1, 1):
        return levels.flatten(1).T
    outputs, inputs = levels.shape[:2]
    tiles = levels.reshape(outputs, inputs, height, width)
    tiles = torch.nn.functional.pad(tiles, (0, 1, 0, 1), value=BETWEEN)
    picture = tiles.permute(1, 2, 0, 3).reshape(inputs * (height + 1), outputs * (width + 1))
    return picture[:-1, :-1]
