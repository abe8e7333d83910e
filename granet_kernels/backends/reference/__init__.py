"""The specification of every operator in plain PyTorch: any device, short, obvious, slow.

Arguments have been checked by the operator. Where a rule exists (ties, NaN, signed zero, empty
tensors) it is visible in the code; the other backends are tested for equality with this one.
"""

from granet_kernels.backends.reference.compressed import compressed_conv2d, compressed_linear
from granet_kernels.backends.reference.conv import masked_conv2d, masked_conv2d_backward
from granet_kernels.backends.reference.linear import masked_linear, masked_linear_backward
from granet_kernels.backends.reference.mask import (
    count_active,
    mask_cast,
    mask_grad,
    pack_mask,
    unpack_mask,
    zero_inactive_,
)
from granet_kernels.backends.reference.select import (
    drop_regrow_,
    prune_,
    prune_drop_regrow_,
    pruned_masks,
    topk_mask,
)
from granet_kernels.backends.reference.sgd import masked_sgd_

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
