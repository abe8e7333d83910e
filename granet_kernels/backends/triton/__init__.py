"""Operators on NVIDIA GPUs in Triton; with ``TRITON_INTERPRET=1`` on the CPU instead, to test them there."""

try:
    import triton
except ImportError:
    raise ImportError("triton is not installed: pip install triton") from None

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
    raise ImportError(
        f"triton {triton.__version__} is too old: pip install 'triton>=3.6' (PyTorch 2.10 brings it)"
    )

from granet_kernels.backends.triton.cast import mask_cast, mask_grad
from granet_kernels.backends.triton.layers import (
    compressed_conv2d,
    compressed_linear,
    masked_conv2d,
    masked_conv2d_backward,
    masked_linear,
    masked_linear_backward,
)
from granet_kernels.backends.triton.mask import (
    count_active,
    pack_mask,
    unpack_mask,
    zero_inactive_,
)
from granet_kernels.backends.triton.select import (
    drop_regrow_,
    prune_,
    prune_drop_regrow_,
    pruned_masks,
    topk_mask,
)
from granet_kernels.backends.triton.sgd import masked_sgd_

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
