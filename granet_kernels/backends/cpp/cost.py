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

# Nanoseconds on one thread, of one of the three passes (forward, two gradients). Fitted to 1742 layers at
# 30 to 90 % sparsity, with AVX-512 and with AVX2 alone: convolutions of 3 to 512 channels with 16 to 1024
# pixels, batch 1 to 64, and linear layers of 10 to 3072 features, batch 1 to 512. What is chosen by them took
# 1.02 times as long as the better of the two in geometric mean (sparse throughout 1.05, dense 1.55). So it
# does on a Xeon (Emerald Rapids) with AVX-512, of 2305 such layers at 30 to 95 % (1.03, 1.65).
DENSE_POINTWISE = 1 / 59  # a product and sum of the dense layer
DENSE_SPATIAL = 1 / 69
DENSE_WEIGHT = 0.47  # masking a weight and its gradient
DENSE_ELEMENT = 0.65  # of input or output
DENSE_CALL = 16_000.0  # more than the sparse layer's
SPARSE_POINTWISE = 1 / 51
SPARSE_SPATIAL = 1 / 37
SPARSE_ACTIVE = 1.3  # fetching an active weight, storing its gradient
SPARSE_WEIGHT = 0.09  # comparing its bit, clearing its gradient
SPARSE_ELEMENT = 0.36  # packed or unpacked

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
    """Whether a layer with ``active`` weights is expected to be faster with the sparse kernels.

    One without an inactive weight computes what the dense layer computes, to the bit.
    """
    if active == shape.weights:
        return False
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
    dense += shape.weights * DENSE_WEIGHT + elements * DENSE_ELEMENT + DENSE_CALL
    sparse = pixels * active * (SPARSE_POINTWISE if pointwise else SPARSE_SPATIAL)
    sparse += active * SPARSE_ACTIVE + shape.weights * SPARSE_WEIGHT + elements * SPARSE_ELEMENT
    return sparse < dense
