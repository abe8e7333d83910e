"""Masked layers, and swapping them into a model."""

from granet_kernels.nn.layers import MaskedConv2d, MaskedLayer, MaskedLinear
from granet_kernels.nn.swap import densify, masked_layers, sparsify

__all__ = ["MaskedConv2d", "MaskedLayer", "MaskedLinear", "densify", "masked_layers", "sparsify"]
