"""From which sparsity on a layer is computed sparsely: what ``granet check -v`` shows."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from granet_kernels.choices import last_choice
from granet_kernels.nn import MaskedConv2d, MaskedLinear

BATCH = 8
SPARSITIES = tuple(s / 10 for s in range(10))


def layers() -> Iterator[tuple[str, MaskedConv2d | MaskedLinear, tuple[int, ...]]]:
    """Name, layer and the shape of its input: layers of ResNet, one after another."""
    for channels, out_channels, kernel, stride, side in (
        (3, 64, 7, 2, 64),
        (64, 64, 3, 1, 32),
        (256, 256, 3, 1, 14),
        (128, 128, 3, 2, 28),
        (64, 256, 1, 1, 28),
        (512, 128, 1, 1, 14),
    ):
        layer = MaskedConv2d(channels, out_channels, kernel, stride, kernel // 2, bias=False)
        name = f"conv {channels} to {out_channels}, {kernel}x{kernel}/{stride}, {side}x{side}"
        yield name, layer, (BATCH, channels, side, side)
    depthwise = MaskedConv2d(64, 64, 3, 1, 1, groups=64, bias=False)
    yield "conv 64, 3x3, depthwise, 28x28", depthwise, (BATCH, 64, 28, 28)
    yield "linear 2048 to 1000", MaskedLinear(2048, 1000), (BATCH, 2048)


def sparse_from() -> Iterator[tuple[str, float | None]]:
    """For each layer the lowest sparsity, in tenths, at which it is computed sparsely on the CPU."""
    generator = torch.Generator().manual_seed(0)
    for name, layer, size in layers():
        input = torch.randn(size, generator=generator)
        yield name, next((s for s in SPARSITIES if _is_sparse(layer, input, s, generator)), None)


def _is_sparse(
    layer: MaskedConv2d | MaskedLinear,
    input: torch.Tensor,
    sparsity: float,
    generator: torch.Generator,
) -> bool:
    layer.mask = torch.rand(layer.weight.shape, generator=generator) >= sparsity
    with torch.no_grad():
        layer(input)
    return last_choice(layer.packed_mask) == "sparse"
