"""Sparse kernels for PyTorch: tensors in, tensors out.

Masked layers with one bit a weight, an optimizer step that skips inactive weights, and exact
selection by magnitude and by score, each in several backends behind one operator. Sparse training
itself (schedules, GraNet) is the package ``granet``.
"""

from granet_kernels._build_info import build_info
from granet_kernels.bitmask import BitMask, attach_mask, attached_mask
from granet_kernels.functional import (
    count_active,
    drop_regrow_,
    mask_cast,
    masked_conv2d,
    masked_linear,
    pack_mask,
    prune_,
    prune_drop_regrow_,
    pruned_masks,
    topk_mask,
    unpack_mask,
    zero_inactive_,
)
from granet_kernels.heap import keep_freed_memory
from granet_kernels.nn import (
    CompressedConv2d,
    CompressedLinear,
    MaskedConv2d,
    MaskedLinear,
    compress,
    densify,
    masked_layers,
    sparsify,
)
from granet_kernels.ops import (
    Backend,
    BackendUnavailableError,
    available_backends,
    backend_status,
    register_backend,
    use_backend,
)
from granet_kernels.optim import MaskedSGD

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "BackendUnavailableError",
    "BitMask",
    "CompressedConv2d",
    "CompressedLinear",
    "MaskedConv2d",
    "MaskedLinear",
    "MaskedSGD",
    "attach_mask",
    "attached_mask",
    "available_backends",
    "backend_status",
    "build_info",
    "compress",
    "count_active",
    "densify",
    "drop_regrow_",
    "keep_freed_memory",
    "mask_cast",
    "masked_conv2d",
    "masked_layers",
    "masked_linear",
    "pack_mask",
    "prune_",
    "prune_drop_regrow_",
    "pruned_masks",
    "register_backend",
    "sparsify",
    "topk_mask",
    "unpack_mask",
    "use_backend",
    "zero_inactive_",
]
