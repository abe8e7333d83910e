"""The operators of namespace ``granet``: schemas, argument checks, fakes, and the backend registry.

One file a family (mask, sgd, select, conv, linear, compressed), the same names as in ``backends/``.
A call is checked whole before anything is written; then the registry says which backend computes it.
"""

import os

from granet_kernels.ops import compressed, conv, linear, mask, registry, select, sgd
from granet_kernels.ops.registry import (
    Backend,
    BackendUnavailableError,
    available_backends,
    backend_for,
    backend_status,
    operators_of,
    register_backend,
    selected_backend,
    use_backend,
)

# From fastest to slowest: the order of preference where several serve a device.
register_backend(Backend(name="cpp", module="granet_kernels.backends.cpp", devices=("cpu",)))
HOST_RUN = os.environ.get("GRANET_SIMT") == "1"
register_backend(
    Backend(
        name="cuda",
        module="granet_kernels.backends.cuda",
        devices=("cpu",) if HOST_RUN else ("cuda",),
        runs_in="tests/simt on the host" if HOST_RUN else "",
    )
)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
register_backend(
    Backend(
        name="triton",
        module="granet_kernels.backends.triton",
        # Triton's interpreter follows the addresses in the kernels' tables on the host.
        devices=("cpu",) if INTERPRETED else ("cuda",),
        runs_in="Triton's interpreter" if INTERPRETED else "",
    )
)
register_backend(
    Backend(name="reference", module="granet_kernels.backends.reference", devices=None)
)
registry.select_from_environment()

OPERATORS = (
    "pack_mask",
    "unpack_mask",
    "count_active",
    "zero_inactive_",
    "mask_cast",
    "mask_grad",
    "masked_sgd_",
    "prune_",
    "pruned_masks",
    "drop_regrow_",
    "prune_drop_regrow_",
    "topk_mask",
    "masked_conv2d",
    "masked_conv2d_backward",
    "masked_linear",
    "masked_linear_backward",
    "compressed_conv2d",
    "compressed_linear",
)

__all__ = [
    "OPERATORS",
    "Backend",
    "BackendUnavailableError",
    "available_backends",
    "backend_for",
    "backend_status",
    "compressed",
    "conv",
    "linear",
    "mask",
    "operators_of",
    "register_backend",
    "select",
    "selected_backend",
    "sgd",
    "use_backend",
]
