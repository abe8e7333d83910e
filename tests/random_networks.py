"""Random little networks of everything that channels can pass through, with dead and unread channels."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = (
    *("convolution", "pointwise", "depthwise", "grouped", "norm", "relu", "relu_in_place"),
    *(
        "hardswish",
        "pool",
        "residual",
        "residual_in_place",
        "concatenation",
        "excitation",
        "padding",
    ),
)


class RandomNetwork(nn.Module):
    """Images (N, 3, 10, 10) to (N, 3)."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.kinds = [draw.choice(KINDS) for _ in range(draw.randint(3, 9))]
        self.parts = nn.ModuleList()
        width = 3
        for kind in self.kinds:
            part, width = make_part(kind, width, draw)
            self.parts.append(part)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for kind, part in zip(self.kinds, self.parts, strict=True):
            if kind == "residual":
                x = F.relu(part(x)) + x
            elif kind == "residual_in_place":
                residual = part(x)
                residual += x
                x = residual
            elif kind == "concatenation":
                x = torch.cat([x, part(x)], 1)
            elif kind == "excitation":
                x = x * part(x.mean((2, 3), keepdim=True)).sigmoid()
            elif kind == "padding":
                x = F.pad(x, (0, 0, 1, 1, 1, 1))
            else:
                x = part(x)
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def make_part(kind: str, width: int, draw: random.Random) -> tuple[nn.Module, int]:
    """A module, and the width behind it."""
    wide = draw.choice((4, 6, 8))
    match kind:
        case "convolution":
            mode = draw.choice(("zeros", "circular", "reflect"))
            padding, bias = draw.choice((0, 1)), draw.random() < 0.5
            return nn.Conv2d(width, wide, 3, 1, padding, bias=bias, padding_mode=mode), wide
        case "pointwise":
            return nn.Conv2d(width, wide, 1, bias=draw.random() < 0.5), wide
        case "depthwise":
            return nn.Conv2d(width, width, 3, padding=1, groups=width), width
        case "grouped":
            return nn.Conv2d(width, width, 1, groups=1 + (width % 2 == 0)), width
        case "residual" | "residual_in_place":
            return nn.Conv2d(width, width, 3, padding=1), width
        case "excitation":
            return nn.Conv2d(width, width, 1), width
        case "concatenation":
            return nn.Conv2d(width, 4, 3, padding=1), width + 4
        case "padding":
            return nn.Identity(), width + 2
        case "norm":
            return nn.BatchNorm2d(width), width
        case "pool":
            pools = (
                nn.MaxPool2d(3, 1, 1),
                nn.AvgPool2d(3, 1, 1),
                nn.AvgPool2d(3, 1, 1, False, False),
            )
            return draw.choice(pools), width
        case "hardswish":
            return nn.Hardswish(), width
    return nn.ReLU(inplace=kind == "relu_in_place"), width


def random_network(seed: int) -> RandomNetwork:
    """In fp64 and evaluation mode; about half of the channels are dead, and many constants are zero."""
    torch.manual_seed(seed)
    network = RandomNetwork(seed).double().eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                _zero_some(module.weight, 0.5)
                _zero_some(module.bias, 0.6)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.size(1) > 1:
                _zero_some(module.weight.transpose(0, 1), 0.4)
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                _zero_some(module.running_mean.normal_(), 0.6)
                _zero_some(module.bias.normal_(), 0.4)
                _zero_some(module.weight, 0.2)
    return network


def _zero_some(tensor: Tensor | None, share: float) -> None:
    """In some rows."""
    if tensor is not None:
        tensor[torch.rand(tensor.size(0)) < share] = 0.0
