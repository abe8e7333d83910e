"""Inputs of the operators that hold only non-zeros; see :mod:`granet_kernels.selftest.inputs`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from granet_kernels.backends.reference import pack_mask
from granet_kernels.selftest.inputs import Inputs, generator
from granet_kernels.selftest.inputs_layers import CONVOLUTIONS, STRIDES

DTYPES = (  # of input, values, bias
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
)
OF_LINEAR = ("contiguous", "transposed", "sliced", "expanded", "contiguous")
"""Strides of inputs: five, so that each meets every one of four dtypes and masks."""
ACTIVE: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "some": lambda shape, g: torch.rand(shape, generator=g) < 0.3,
    "nothing": lambda shape, g: torch.zeros(shape, dtype=torch.bool),
    "everything": lambda shape, g: torch.ones(shape, dtype=torch.bool),
    "half-of-the-filters": lambda shape, g: _half_of_the_filters(shape, g),
}


def _half_of_the_filters(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Every other filter is empty, the others are not."""
    active = torch.rand(shape, generator=g) < 0.5
    active[::2] = False
    return active


def compressed_conv2d_cases() -> Iterator[Inputs]:
    yield from _by_both_algorithms(_convolutions())


def compressed_linear_cases() -> Iterator[Inputs]:
    yield from _by_both_algorithms(_linears())


def _by_both_algorithms(cases: Iterator[Inputs]) -> Iterator[Inputs]:
    for label, args, options, depth in cases:
        for algorithm in ("sparse", "dense"):
            yield f"{label}-{algorithm}", args, options | {"algorithm": algorithm}, depth


def _convolutions() -> Iterator[Inputs]:
    g = generator()
    formats = ("contiguous", "channels_last")
    for i, (label, dtypes, strides) in enumerate(product(CONVOLUTIONS, DTYPES, formats)):
        name = f"{label}-{_named(dtypes)}-{strides}"
        yield name, *_convolution(label, dtypes, strides, "some", i, g)
    for i, (label, active) in enumerate(product(("3x3", "1x1", "grouped"), ACTIVE)):
        yield f"{label}-{active}", *_convolution(label, DTYPES[0], formats[1 - i % 2], active, i, g)
    for i, (label, strides) in enumerate(product(("3x3", "1x1"), STRIDES)):
        dtypes = DTYPES[i % len(DTYPES)]
        yield f"{label}-{strides}", *_convolution(label, dtypes, strides, "some", i, g)


def _convolution(
    label: str,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    strides: str,
    active: str,
    i: int,
    g: torch.Generator,
) -> tuple[tuple[object, ...], dict[str, object], int]:
    """``strides`` of the input; ``i`` says what is fused: bias, residual of either layout, ReLU."""
    spec = CONVOLUTIONS[label]
    stride, padding = spec.get("stride", [1, 1]), spec.get("padding", [0, 0])
    dilation, groups = spec.get("dilation", [1, 1]), spec.get("groups", 1)
    input = STRIDES[strides](torch.randn(spec["size"], generator=g).to(dtypes[0]))
    shape = spec["weight"]
    values, mask = _stored(shape, dtypes[1], active, g)
    size = F.conv2d(
        input.float(), torch.zeros(shape), None, stride, padding, dilation, groups
    ).shape
    residual = torch.randn(size, generator=g).to(dtypes[0]) if i % 3 else None
    if residual is not None and i % 3 == 1:
        residual = residual.contiguous(memory_format=torch.channels_last)
    bias = torch.randn(shape[0], generator=g).to(dtypes[2]) if i % 4 else None
    geometry = (list(shape), stride, padding, dilation, groups)
    depth = shape[1] * shape[2] * shape[3] + 5
    return (input, values, mask, bias, residual, *geometry, i % 5 < 3), {}, depth


def _linears() -> Iterator[Inputs]:
    g = generator()
    sizes = ((7, 33), (2, 3, 33), (33,), (0, 33), (64, 33))
    for i, (size, dtypes, active) in enumerate(product(sizes, DTYPES, ACTIVE)):
        values, mask = _stored((9, 33), dtypes[1], active, g)
        bias = torch.randn(9, generator=g).to(dtypes[2]) if i % 3 else None
        input = torch.randn(size, generator=g).to(dtypes[0])
        if len(size) > 1:
            input = STRIDES[OF_LINEAR[i % len(OF_LINEAR)]](input)
        args = (input, values, mask, bias, [9, 33], i % 2 == 0)
        yield f"{size}-{_named(dtypes)}-{active}", args, {}, 33 + 4


def _stored(
    shape: tuple[int, ...], dtype: torch.dtype, active: str, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Values, some of them zero, and the mask that they belong to."""
    chosen = ACTIVE[active](shape, g)
    values = torch.randn(int(chosen.sum()), generator=g)
    values[torch.rand(values.shape, generator=g) < 0.05] = 0.0
    return values.to(dtype), pack_mask(chosen.flatten())


def _named(dtypes: tuple[torch.dtype, ...]) -> str:
    return "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


GENERATORS: dict[str, Callable[[], Iterator[Inputs]]] = {
    "compressed_conv2d": compressed_conv2d_cases,
    "compressed_linear": compressed_linear_cases,
}
