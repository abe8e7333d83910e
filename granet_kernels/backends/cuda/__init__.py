"""Operators on NVIDIA GPUs in CUDA C++; with ``GRANET_SIMT=1`` on the CPU instead, to test them there.

Importing this package loads the compiled library; the ImportError says why it cannot be loaded.
"""

from granet_kernels.backends.cuda.layers import (
    compressed_conv2d,
    compressed_linear,
    masked_conv2d,
    masked_conv2d_backward,
    masked_linear,
    masked_linear_backward,
)
from granet_kernels.backends.cuda.library import load
from granet_kernels.backends.cuda.mask import (
    count_active,
    mask_cast,
    mask_grad,
    pack_mask,
    unpack_mask,
    zero_inactive_,
)
from granet_kernels.backends.cuda.select import (
    drop_regrow_,
    prune_,
    prune_drop_regrow_,
    pruned_masks,
    topk_mask,
)
from granet_kernels.backends.cuda.sgd import (
    masked_sgd_,
    try_masked_sgd_,  # noqa: F401 - the registry looks for it
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
