"""SparseProp (Nikdan et al., ICML 2023), the CPU peer: sparse backpropagation for unstructured masks.

It is no dependency: `pip install sparseprop==0.1.14 --no-build-isolation` adds its rows to the table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

from bench.cpu.shapes import ConvShape, LinearShape

MODES = {"over width": True, "over batch": False}
"""What its convolution vectorises over; which is faster depends on the shape."""


@functools.cache
def library() -> ModuleType | None:
    """The package, or None where it is not installed or was built for another torch."""
    try:
        import sparseprop.modules
    except (ImportError, OSError):
        return None
    return sparseprop.modules  # type: ignore[no-any-return]


def layers(shape: ConvShape | LinearShape) -> dict[str, Callable[[Tensor], nn.Module]]:
    """By variant, what makes a layer of a dense weight with zeros; empty without the package."""
    modules = library()
    if modules is None:
        return {}
    if isinstance(shape, LinearShape):
        return {"contiguous": modules.SparseLinear}
    return {
        mode: functools.partial(
            modules.SparseConv2d,
            padding=shape.padding,
            stride=shape.stride,
            vectorizing_over_on=over_width,
        )
        for mode, over_width in MODES.items()
    }


def weight_gradient(layer: nn.Module) -> Tensor:
    """The weight's gradient as a dense tensor; also of layers that are not SparseProp's."""
    gradient = layer.weight.grad
    assert isinstance(gradient, Tensor)
    if type(layer).__module__.partition(".")[0] != "sparseprop":
        return gradient
    from sparseprop.modules import utils

    if hasattr(layer, "OC"):
        size = (layer.OC, layer.IC, layer.K, layer.K)
        return utils.from_sparse_format_conv2d(gradient, layer.W_idx, size)  # type: ignore[no-any-return]
    rows = layer.W_idx[0].diff().to(torch.int64)
    dense = torch.zeros(layer.N, layer.M)
    row = torch.repeat_interleave(torch.arange(layer.N), rows)
    dense[row, layer.W_idx[1].to(torch.int64)] = gradient
    return dense
