"""Channels of tensors, and what layers make of those that are constant.

A channel is constant if it has the same value at all positions whatever the network is given. Constants of
a tensor are an fp64 vector, one for each channel: its value, or NaN where it varies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

VARIES = math.nan


class Groups:
    """Things by number, some of them joined."""

    def __init__(self) -> None:
        self._parents: list[int] = []

    def add(self) -> int:
        """A thing of its own."""
        self._parents.append(len(self._parents))
        return self._parents[-1]

    def find(self, thing: int) -> int:
        """The one that stands for all that are joined with it."""
        while self._parents[thing] != thing:
            self._parents[thing] = self._parents[self._parents[thing]]
            thing = self._parents[thing]
        return thing

    def join(self, left: int, right: int) -> None:
        self._parents[self.find(left)] = self.find(right)


@dataclass(frozen=True, slots=True)
class Channels:
    """Those of a tensor."""

    slots: tuple[int, ...]
    constant: Tensor
    dim: int
    """Of the tensor, along which they lie."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A call of a module that has something for each channel."""

    name: str
    module: nn.Module
    input: Channels
    output: Channels

    @property
    def mixes(self) -> bool:
        """Whether an output channel is made of all input channels."""
        return is_mixing(self.module)


def is_mixing(module: nn.Module) -> bool:
    """A linear layer, or a convolution without groups."""
    return type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1)


def taps(module: nn.Module) -> Tensor:
    """The weights of a layer or depthwise convolution: (out, in, positions of the kernel)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().reshape(*weight.shape[:2], -1)


def absorbs(module: nn.Module, constant: Tensor) -> Tensor:
    """Which input channels give the same to every position of a layer's output: bool, one a channel.

    Zero padding cuts a constant that is not zero off at the border.
    """
    known = ~constant.isnan()
    return known if _pads_nothing(module) else known & (constant == 0)


def _pads_nothing(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d) or module.padding_mode != "zeros":
        return True
    if isinstance(module.padding, str):
        return module.padding == "valid" or set(module.kernel_size) == {1}
    return not any(module.padding)


def varying(count: int) -> Tensor:
    return torch.full((count,), VARIES, dtype=torch.float64)


def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64)


def mixed_constant(module: nn.Module, constant: Tensor) -> Tensor:
    """What a linear layer, or a convolution without groups, makes of constants."""
    weight = taps(module)
    varies = ((weight != 0).any(2) & ~absorbs(module, constant)).any(1)
    value = weight.sum(2) @ constant.nan_to_num(0.0) + _bias(module)
    return torch.where(varies, VARIES, value)


def depthwise_constant(module: nn.Module, constant: Tensor) -> Tensor:
    """What a depthwise convolution makes of constants."""
    weight = taps(module)[:, 0]
    known = absorbs(module, constant) | ~(weight != 0).any(1)
    value = weight.sum(1) * constant.nan_to_num(0.0) + _bias(module)
    return torch.where(known, value, VARIES)


def normed_constant(norm: nn.BatchNorm2d | nn.BatchNorm1d, constant: Tensor) -> Tensor:
    """What a batch norm with running statistics makes of constants; a scale of 0 makes one of anything."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    shift: Tensor | float = 0.0
    known = ~constant.isnan()
    if norm.affine:
        scale, shift = scale * norm.weight.detach(), norm.bias.detach()
        known |= norm.weight.detach() == 0
    value = (constant.nan_to_num(0.0) - norm.running_mean) * scale + shift
    return torch.where(known, value, VARIES)


def mapped_constant(function: Callable[[Tensor], Tensor], constant: Tensor) -> Tensor:
    """Of an elementwise function, which may not hand NaN on as it is."""
    values = function(constant.nan_to_num(0.0))  # a copy, which it may write to
    return torch.where(constant.isnan(), VARIES, values)


def cut_constant(constant: Tensor) -> Tensor:
    """Where zeros come in at the border: 0 stays constant, nothing else."""
    return torch.where(constant == 0, constant, VARIES)


def _bias(module: nn.Conv2d | nn.Linear | nn.Module) -> Tensor | float:
    bias = module.bias
    return bias.detach() if isinstance(bias, Tensor) else 0.0
