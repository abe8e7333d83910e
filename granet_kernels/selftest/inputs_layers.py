"""Inputs of the layers with a masked weight; see :mod:`granet_kernels.selftest.inputs`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor

from granet_kernels.backends.reference import masked_conv2d
from granet_kernels.choices import ALGORITHMS
from granet_kernels.selftest.inputs import LAYOUTS, Inputs, generator, random_mask

STRIDES = LAYOUTS | {
    "sliced": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda t: t[:1].expand(t.shape),
}
"""What inputs and gradients of outputs may have."""

Convolution = tuple[str, Tensor, Tensor, Tensor, Tensor | None, tuple[Any, ...], int]
"""Label, input, weight, mask, bias, geometry, depth of the sums."""

Linear = tuple[str, Tensor, Tensor, Tensor, Tensor | None, str]
"""Label, input, weight, mask, bias, strides of the input and of the output's gradient."""

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "3x3": {"size": (2, 8, 9, 9), "weight": (16, 8, 3, 3), "padding": [1, 1]},
    "1x1": {"size": (3, 8, 7, 5), "weight": (9, 8, 1, 1)},
    "7x7-stride-2": {
        "size": (1, 3, 17, 19),
        "weight": (8, 3, 7, 7),
        "stride": [2, 2],
        "padding": [3, 3],
    },
    "dilated": {
        "size": (2, 4, 11, 11),
        "weight": (6, 4, 3, 3),
        "dilation": [2, 3],
        "padding": [2, 0],
    },
    "grouped": {"size": (2, 8, 6, 6), "weight": (4, 2, 3, 3), "groups": 4, "padding": [1, 1]},
    "depthwise": {"size": (2, 5, 6, 6), "weight": (5, 1, 3, 3), "groups": 5, "stride": [2, 1]},
    "many-small-images": {"size": (19, 5, 4, 5), "weight": (7, 5, 3, 3), "padding": [1, 1]},
    "many-small-stride-2": {
        "size": (33, 3, 7, 6),
        "weight": (5, 3, 3, 3),
        "stride": [2, 2],
        "padding": [1, 1],
    },
    "stride-3-wide": {
        "size": (1, 3, 8, 75),
        "weight": (4, 3, 2, 5),
        "stride": [3, 2],
        "padding": [1, 4],
    },
    "1x1-large-planes": {"size": (2, 6, 13, 12), "weight": (5, 6, 1, 1)},
    "1x1-stride-2": {"size": (2, 6, 9, 9), "weight": (5, 6, 1, 1), "stride": [2, 2]},
    "no-images": {"size": (0, 8, 9, 9), "weight": (4, 8, 3, 3)},
    "one-pixel": {"size": (1, 1, 1, 1), "weight": (1, 1, 1, 1)},
}


def masked_conv2d_cases() -> Iterator[Inputs]:
    cases = chain(_convolutions(), _convolutions_of_mixed_layouts())
    for label, input, kernel, mask, bias, geometry, depth in cases:
        for algorithm in ALGORITHMS:
            options = {"algorithm": algorithm}
            yield f"{label}-{algorithm}", (input, kernel, mask, bias, *geometry), options, depth


def masked_conv2d_backward_cases() -> Iterator[Inputs]:
    g = generator(1)
    needs_of = ([True, True, True], [False, True, False], [True, False, False])
    for i, case in enumerate(_convolutions()):
        yield from _backward(case, "contiguous", i % 2 == 1, needs_of[i % 3], g)
    for i, case in enumerate(_convolutions_of_mixed_layouts()):
        strides = list(STRIDES)[i % len(STRIDES)]
        yield from _backward(case, strides, i % 2 == 1, needs_of[0], g)


def _backward(
    case: Convolution, strides: str, is_dense: bool, needs: list[bool], g: torch.Generator
) -> Iterator[Inputs]:
    """``strides``: of the output's gradient."""
    label, input, kernel, mask, bias, geometry, _ = case
    output = masked_conv2d(input, kernel, mask, bias, *geometry)
    grad = STRIDES[strides](torch.randn(output.shape, generator=g).to(input.dtype))
    depth = max(grad.numel(), kernel.numel()) + 4
    needs = needs if bias is not None else [True, True, False]
    args = (grad, input, kernel, mask, bias, torch.tensor(is_dense), *geometry, needs)
    for algorithm in ALGORITHMS:
        name = f"{label}-{algorithm}-{'dense' if is_dense else 'masked'}-{strides}-gradient"
        yield name, args, {"algorithm": algorithm}, depth


def _convolutions() -> Iterator[Convolution]:
    g = generator()
    formats = ("contiguous", "channels_last")
    for label, dtype, layout in product(CONVOLUTIONS, (torch.float32, torch.bfloat16), formats):
        yield _convolution(label, dtype, layout, layout, layout == "channels_last", g)


def _convolutions_of_mixed_layouts() -> Iterator[Convolution]:
    """Memory of the input and of the weight in any two orders, and an input with gaps."""
    g = generator(2)
    for i, (of_weight, of_input) in enumerate(product(LAYOUTS, STRIDES)):
        dtype = (torch.float32, torch.bfloat16)[i % 2]
        yield _convolution(("3x3", "1x1")[i // 2 % 2], dtype, of_input, of_weight, i % 3 > 0, g)


def _convolution(
    label: str,
    dtype: torch.dtype,
    of_input: str,
    of_weight: str,
    has_bias: bool,
    g: torch.Generator,
) -> Convolution:
    spec = CONVOLUTIONS[label]
    geometry = (
        spec.get("stride", [1, 1]),
        spec.get("padding", [0, 0]),
        spec.get("dilation", [1, 1]),
        spec.get("groups", 1),
    )
    input = STRIDES[of_input](torch.randn(spec["size"], generator=g).to(dtype))
    kernel = LAYOUTS[of_weight](torch.randn(spec["weight"], generator=g))
    mask = random_mask(kernel.numel(), g, 0.7)
    kernel[torch.rand(kernel.shape, generator=g) < 0.05] = 0.0
    bias = torch.randn(kernel.size(0), generator=g) if has_bias else None
    layout = of_input if of_input == of_weight else f"{of_input}-by-{of_weight}"
    return (
        f"{label}-{dtype}-{layout}",
        input,
        kernel,
        mask,
        bias,
        geometry,
        kernel[0].numel() + 4,
    )


def masked_linear_cases() -> Iterator[Inputs]:
    for label, input, kernel, mask, bias, _ in _linears():
        for algorithm in ALGORITHMS:
            options, depth = {"algorithm": algorithm}, kernel.size(1) + 4
            yield f"{label}-{algorithm}", (input, kernel, mask, bias), options, depth


def masked_linear_backward_cases() -> Iterator[Inputs]:
    g = generator(1)
    for i, (label, input, kernel, mask, bias, strides) in enumerate(_linears()):
        grad = torch.randn((*input.shape[:-1], kernel.size(0)), generator=g).to(input.dtype)
        needs = [i % 3 != 1, i % 3 != 2, bias is not None and i % 8 < 4]
        depth = max(grad.numel(), kernel.numel()) + 4
        flag = torch.tensor(i % 2 == 1)
        args = (STRIDES[strides](grad), input, kernel, mask, bias, flag, needs)
        for algorithm in ALGORITHMS:
            yield f"{label}-{algorithm}", args, {"algorithm": algorithm}, depth


def _linears() -> Iterator[Linear]:
    g = generator()
    sizes = ((7, 33), (2, 3, 33), (33,), (0, 33), (64, 33))
    forms = [(size, "contiguous") for size in sizes]
    forms += product(sizes[:2], ("transposed", "sliced", "expanded"))
    for size, strides in forms:
        for dtype in (torch.float32, torch.bfloat16):
            for layout in ("contiguous", "transposed"):
                kernel = LAYOUTS[layout](torch.randn(9, 33, generator=g))
                mask = random_mask(kernel.numel(), g, 0.7)
                bias = torch.randn(9, generator=g) if layout == "transposed" else None
                input = STRIDES[strides](torch.randn(size, generator=g).to(dtype))
                name = f"{size}-{dtype}-{strides}-by-{layout}"
                yield name, input, kernel, mask, bias, strides


GENERATORS: dict[str, Callable[[], Iterator[Inputs]]] = {
    "masked_conv2d": masked_conv2d_cases,
    "masked_conv2d_backward": masked_conv2d_backward_cases,
    "masked_linear": masked_linear_cases,
    "masked_linear_backward": masked_linear_backward_cases,
}
