"""Operators on the CPU in C++.

Importing this package loads the compiled library; the ImportError says why it cannot be loaded.
"""

from granet_kernels.backends.cpp.compressed import compressed_conv2d, compressed_linear
from granet_kernels.backends.cpp.conv import (
    masked_conv2d,
    masked_conv2d_backward,
    try_masked_conv2d,  # noqa: F401 - the registry looks for these
    try_masked_conv2d_backward,  # noqa: F401
)
from granet_kernels.backends.cpp.library import load
from granet_kernels.backends.cpp.linear import (
    masked_linear,
    masked_linear_backward,
    try_masked_linear,  # noqa: F401
    try_masked_linear_backward,  # noqa: F401
)
from granet_kernels.backends.cpp.mask import (
    count_active,
    mask_cast,
    mask_grad,
    pack_mask,
    unpack_mask,
    zero_inactive_,
)
from granet_kernels.backends.cpp.select import (
    drop_regrow_,
    prune_,
    prune_drop_regrow_,
    pruned_masks,
    topk_mask,
)
from granet_kernels.backends.cpp.sgd import (
    masked_sgd_,
    try_masked_sgd_,  # noqa: F401
)

__all__ = [
    "compressed_conv2d",
    "compressed_linear",
    "count_active",
    "drop_regrow_",
    "mask_cast",
    "mask_grad",
    "masked_conv2d",
    "masked_conv2d_backward",
    "masked_linear",
    "masked_linear_backward",
    "masked_sgd_",
    "pack_mask",
    "prune_",
    "prune_drop_regrow_",
    "pruned_masks",
    "topk_mask",
    "unpack_mask",
    "zero_inactive_",
]

load()
