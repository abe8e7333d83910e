"""Networks with dead channels, and what is left when those are removed."""

from __future__ import annotations

import torch
from torch import nn

from granet.export.dead_channels import Removal, remove_dead_channels

DEAD = [1, 3]


def removed(model: nn.Module, *shape: int) -> Removal:
    """Without its dead channels; the outputs are those of before, in fp64."""
    model.double().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    removal = remove_dead_channels(model, shape)
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(5)).double()
    with torch.no_grad():
        expected, result = model(images), removal.model(images)
    assert expected.abs().max() > 0
    assert torch.allclose(result, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    return removal


def kill(layer: nn.Module, channels: list[int] = DEAD, bias: float = 0.0) -> None:
    """Output channels that are constant."""
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    with torch.no_grad():
        layer.weight[channels] = 0.0
        if layer.bias is not None:
            layer.bias[channels] = bias


def ignore(layer: nn.Module, channels: list[int] = DEAD) -> None:
    """Input channels that nobody reads."""
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    with torch.no_grad():
        layer.weight[:, channels] = 0.0


def settle(norm: nn.Module, at_zero: float | None = None, channels: list[int] = DEAD) -> None:
    """Statistics of a batch norm; `at_zero` is what it makes of 0 in some channels."""
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        for tensor in (norm.running_mean, norm.bias):
            assert tensor is not None
            tensor.normal_()
        for tensor in (norm.running_var, norm.weight):
            assert tensor is not None
            tensor.uniform_(0.5, 1.5)
        if at_zero is not None:
            assert norm.running_mean is not None
            norm.running_mean[channels] = 0.0
            norm.bias[channels] = at_zero


def stack(*middle: nn.Module, padding: int = 1, bias: bool = False) -> nn.Sequential:
    """A convolution with two dead channels of six, something, a convolution, the mean."""
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=bias),
        *middle,
        nn.Conv2d(6, 4, 3, padding=padding, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    kill(model[0])
    return model
