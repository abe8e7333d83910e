"""Masked layers, swapping them into a model, and compressing a model to its non-zeros."""

from granet_kernels.nn.compress import compress
from granet_kernels.nn.compressed import CompressedConv2d, CompressedLayer, CompressedLinear
from granet_kernels.nn.layers import MaskedConv2d, MaskedLayer, MaskedLinear
from granet_kernels.nn.swap import densify, masked_layers, sparsify

__all__ = [
    "CompressedConv2d",
    "CompressedLayer",
    "CompressedLinear",
    "MaskedConv2d",
    "MaskedLayer",
    "MaskedLinear",
    "compress",
    "densify",
    "masked_layers",
    "sparsify",
]
