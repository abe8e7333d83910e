"""Operators on the CPU in C++.

Importing this package loads the compiled library; the ImportError says why it cannot be loaded.
"""

from granet_kernels.backends.cpp.conv import masked_conv2d, masked_conv2d_backward
from granet_kernels.backends.cpp.library import load
from granet_kernels.backends.cpp.linear import masked_linear, masked_linear_backward
from granet_kernels.backends.cpp.mask import count_active, pack_mask, unpack_mask, zero_inactive_

__all__ = [
    "count_active",
    "masked_conv2d",
    "masked_conv2d_backward",
    "masked_linear",
    "masked_linear_backward",
    "pack_mask",
    "unpack_mask",
    "zero_inactive_",
]

load()
