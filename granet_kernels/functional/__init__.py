"""The public functions, typed, and their ``torch.autograd.Function`` wrappers.

A wrapper brings its arguments into the form that the operator takes and calls it; what is computed,
and where, is the operator's business (:mod:`granet_kernels.ops`). Packed masks are 1-D uint8
tensors of one bit a weight in storage order (:mod:`granet_kernels.layout`). Operators that end in
an underscore write their arguments in place, outside autograd.
"""

from granet_kernels.functional.layers import (
    autocast_dtype,
    mask_cast,
    masked_conv2d,
    masked_linear,
)
from granet_kernels.functional.mask import count_active, pack_mask, unpack_mask, zero_inactive_
from granet_kernels.functional.select import (
    drop_regrow_,
    prune_,
    prune_drop_regrow_,
    pruned_masks,
    topk_mask,
)

__all__ = [
    "autocast_dtype",
    "count_active",
    "drop_regrow_",
    "mask_cast",
    "masked_conv2d",
    "masked_linear",
    "pack_mask",
    "prune_",
    "prune_drop_regrow_",
    "pruned_masks",
    "topk_mask",
    "unpack_mask",
    "zero_inactive_",
]
