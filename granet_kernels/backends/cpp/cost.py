"""What a layer is expected to cost, dense and sparse: the choice between the two.

Rates are those of one core of an AVX2 or AVX-512 machine, in units that cancel in the comparison: a
choice must not depend on a measurement of this run, or a resumed run would compute otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from granet_kernels.backends.cpp.index import LARGEST_OFFSET, Shape
from granet_kernels.choices import choice_of

COMPUTED = (torch.float32, torch.bfloat16)
"""What the sparse kernels read and write; they sum in float32."""

# Nanoseconds on one thread, of one of the three passes (forward, two gradients). Fitted to 550 layers,
# convolutions of 3 to 256 channels with 16 to 1024 pixels, batch 1 to 64, and linear layers, at 30 to 90 %
# sparsity: what is chosen by them took 1.03 times as long as the better of the two in geometric mean (the
# sparse one throughout 1.08, the dense one 1.25).
DENSE_POINTWISE = 1 / 43  # a product and sum of the dense layer
DENSE_SPATIAL = 1 / 38
DENSE_WEIGHT = 0.8  # masking a weight and its gradient
DENSE_ELEMENT = 0.6  # of input or output
SPARSE_PRODUCT = 1 / 21
SPARSE_ACTIVE = 2.6  # fetching an active weight, storing its gradient
SPARSE_WEIGHT = 0.5  # comparing its bit, clearing its gradient
SPARSE_ELEMENT = 0.3  # packed or unpacked
SPARSE_CALL = 8_000.0  # more than the dense layer's

NATIVE_BFLOAT16 = 0.5
"""Of the time of dense products, where the processor multiplies bfloat16 itself."""


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
    choice_of(mask).last = "sparse" if sparse else "dense"
    return sparse


def prefers_sparse(shape: Shape, active: int, dtype: torch.dtype) -> bool:
    """Whether a layer with ``active`` weights is expected to be faster with the sparse kernels."""
    height, width = shape.output_size
    pixels = shape.batch * height * width
    elements = (
        shape.batch * shape.channels * shape.height * shape.width + pixels * shape.out_channels
    )
    pointwise = shape.kernel_h == shape.kernel_w == 1
    product = DENSE_POINTWISE if pointwise else DENSE_SPATIAL
    if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported():
        product *= NATIVE_BFLOAT16
    dense = pixels * shape.weights * product
    dense += shape.weights * DENSE_WEIGHT + elements * DENSE_ELEMENT
    sparse = pixels * active * SPARSE_PRODUCT + active * SPARSE_ACTIVE
    sparse += shape.weights * SPARSE_WEIGHT + elements * SPARSE_ELEMENT + SPARSE_CALL
    return sparse < dense
