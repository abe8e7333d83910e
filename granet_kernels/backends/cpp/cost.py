"""What a layer is expected to cost, dense and sparse: the choice between the two.

Rates are those of one core of an AVX2 or AVX-512 machine, in units that cancel in the comparison: a
choice must not depend on a measurement of this run, or a resumed run would compute otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from granet_kernels.backends.cpp.index import LARGEST_OFFSET, Shape
from granet_kernels.choices import note_choice

COMPUTED = (torch.float32, torch.bfloat16)
"""What the sparse kernels read and write; they sum in float32."""

# Nanoseconds, fitted to ResNet's shapes (bench/cpu): a product and sum of the dense convolution, the same of
# an active weight, an element packed or unpacked, and a call.
DENSE_POINTWISE = 1 / 38
DENSE_SPATIAL = 1 / 46
SPARSE = 1 / 33
ELEMENT = 1.0
CALL = 20_000.0

NATIVE_BFLOAT16 = 0.5
"""Of the dense cost, where the processor multiplies bfloat16 itself."""


def chooses_sparse(
    shape: Shape, input: Tensor, weight: Tensor, mask: Tensor, active: int, algorithm: str
) -> bool:
    """Whether the sparse kernels compute a layer of ``active`` weights; noted for its ``repr``.

    ``weight`` is the tensor that holds the weights: all of them, or the active ones alone.
    """
    possible = (
        input.dtype in COMPUTED
        and weight.dtype in COMPUTED
        and 0 not in shape[: shape._fields.index("padding_h")]
        and shape.weights <= LARGEST_OFFSET
        and (weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last))
    )
    if algorithm == "auto":
        sparse = possible and prefers_sparse(shape, active, input.dtype)
    else:
        sparse = possible and algorithm == "sparse"
    note_choice(mask, "sparse" if sparse else "dense")
    return sparse


def prefers_sparse(shape: Shape, active: int, dtype: torch.dtype) -> bool:
    """Whether a layer with ``active`` weights is expected to be faster with the sparse kernels."""
    height, width = shape.output_size
    pixels = shape.batch * height * width
    pointwise = shape.kernel_h == shape.kernel_w == 1
    dense_time = pixels * shape.weights * (DENSE_POINTWISE if pointwise else DENSE_SPATIAL)
    if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported():
        dense_time *= NATIVE_BFLOAT16
    elements = (
        shape.batch * shape.channels * shape.height * shape.width + pixels * shape.out_channels
    )
    return pixels * active * SPARSE + elements * ELEMENT + CALL < dense_time
