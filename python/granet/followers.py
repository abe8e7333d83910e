"""Copies of a model, such as averages of its weights, that have its masks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from granet.placement import Layer
from granet.sharded import placement_of
from granet_kernels import masked_layers, zero_inactive_


class Follower:
    """The masked layers of a copy, by the names that they have in the model."""

    def __init__(self, model: nn.Module, layers: Mapping[str, Layer]) -> None:
        theirs = masked_layers(model)
        prefix = _common_prefix(list(theirs), list(layers))
        if prefix is None:
            raise ValueError(
                f"model: expected a copy with the masked layers {', '.join(layers)}, got one with "
                f"{', '.join(theirs) or 'none'}"
            )
        self._layers = {name: theirs[prefix + name] for name in layers}

    def catch_up(self, layers: Mapping[str, Layer]) -> None:
        """Take the masks of the model's layers; what is inactive is set to zero."""
        for name, layer in layers.items():
            self._layers[name].mask = layer.mask.to(self._layers[name].weight.device)
        parts = placement_of(self._layers).parts(self._layers.values())
        with torch.no_grad():
            zero_inactive_([part.weight for part in parts], [part.mask for part in parts])


def _common_prefix(theirs: list[str], ours: list[str]) -> str | None:
    """What a wrapper puts in front of every name; None if the names do not match."""
    if len(theirs) != len(ours) or not theirs[0].endswith(ours[0]):
        return None
    prefix = theirs[0].removesuffix(ours[0])
    return prefix if theirs == [prefix + name for name in ours] else None
