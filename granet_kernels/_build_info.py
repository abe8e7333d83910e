"""What this installation contains."""

from __future__ import annotations

import platform
from typing import Any

import torch

from granet_kernels.ops import backend_status


def build_info() -> dict[str, Any]:
    """Versions at run time, the state of every backend, and how the compiled part was built.

    Returns:
        ``python`` and ``torch``, the versions at run time; ``backends``, from name to "available" or
        the reason why not; ``native``, of the compiled part (compiler, standard, ABI target, CUDA
        toolkit, and which of the CPU kernels this machine runs), None where it is absent.
    """
    try:
        from granet_kernels import _native
    except ImportError:
        native = None
    else:
        native = _native.build_info()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "backends": {name: reason or "available" for name, reason in backend_status().items()},
        "native": native,
    }
