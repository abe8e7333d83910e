"""ResNet-50 (He et al., 2016; stride in the 3x3 convolution), written out so that the benchmark
needs no torchvision. Parameter names and shapes are torchvision's, the arithmetic is the same.

`width`, `blocks` and `classes` shrink it for a dry run on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

EXPANSION = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Extent of the network; the defaults are ResNet-50 on ImageNet."""

    width: int = 64
    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)
    classes: int = 1000


RESNET50 = Size()
TOY = Size(width=4, blocks=(1, 1, 1, 1), classes=10)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions beside a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        channels_out = channels * EXPANSION
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + shortcut)  # type: ignore[no-any-return]


def _stages(size: Size) -> list[nn.Sequential]:
    """Four runs of blocks; each but the first halves the side and doubles the channels."""
    stages = []
    channels_in = size.width
    for stage, count in enumerate(size.blocks):
        channels = size.width << stage
        layer = nn.Sequential()
        for block in range(count):
            stride = 2 if stage > 0 and block == 0 else 1
            layer.append(Bottleneck(channels_in, channels, stride))
            channels_in = channels * EXPANSION
        stages.append(layer)
    return stages


class ResNet(nn.Module):
    """(B, 3, H, W) images to (B, classes) logits; H and W of 32 or more."""

    def __init__(self, size: Size = RESNET50) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, size.width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(size.width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1, self.layer2, self.layer3, self.layer4 = _stages(size)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear((size.width << 3) * EXPANSION, size.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


def parameter_shapes(size: Size = RESNET50) -> list[tuple[int, ...]]:
    """Shapes of all parameters in order: 161 tensors, 25,557,032 numbers for ResNet-50."""
    with torch.device("meta"):
        return [tuple(parameter.shape) for parameter in ResNet(size).parameters()]


def is_weight(shape: Sequence[int]) -> bool:
    """Whether a parameter of this shape gets a mask: convolutions and the classifier's matrix."""
    return len(shape) > 1


def weight_shapes(size: Size = RESNET50) -> list[tuple[int, ...]]:
    """Shapes that get masks: 54 tensors, 25,502,912 numbers for ResNet-50."""
    return [shape for shape in parameter_shapes(size) if is_weight(shape)]


def kaiming_weights(
    shapes: Sequence[tuple[int, ...]], device: torch.device, seed: int
) -> list[Tensor]:
    """fp32 tensors as a fresh network has them: N(0, 2 / fan_out) (He et al., 2015); ones for
    1-D shapes (norms)."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = []
    for shape in shapes:
        if not is_weight(shape):
            weights.append(torch.ones(shape, device=device))
            continue
        fan_out = shape[0] * math.prod(shape[2:])
        weights.append(
            torch.randn(shape, device=device, generator=generator) * math.sqrt(2 / fan_out)
        )
    return weights
