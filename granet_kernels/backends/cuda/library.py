"""The shared library that holds the compiled operators, for a GPU or, in tests, for the host."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

HOST_RUN = os.environ.get("GRANET_SIMT") == "1"
"""Whether the kernels run on the CPU: see tests/simt."""

LIBRARY = Path(__file__).parents[2] / "_granet_cuda.so"
HOST_LIBRARY = Path(__file__).parents[3] / "build" / "simt" / "_granet_cuda.so"


def load() -> None:
    """Load the library, which registers the operators of namespace ``granet_cuda``.

    Raises:
        ImportError: it is absent or does not load; the message says why and what to install.
    """
    if HOST_RUN:
        if not HOST_LIBRARY.is_file():
            raise ImportError(
                f"GRANET_SIMT=1, but the kernels are not built for the host: {HOST_LIBRARY} is "
                "missing; run `make simt` in a checkout of the sources"
            )
        torch.ops.load_library(HOST_LIBRARY)
        return
    if torch.version.cuda is None:
        raise ImportError(
            f"torch {torch.__version__} is built without CUDA: install a torch that has it, and "
            "then rebuild with `pip install --no-build-isolation .`"
        )
    if not LIBRARY.is_file():
        raise ImportError(
            f"the CUDA extension is not installed: {LIBRARY.name} was not built, for want of nvcc "
            "or because of GRANET_BUILD_CUDA=0; install the CUDA toolkit, or nvidia-cuda-nvcc, and "
            "run `pip install --no-build-isolation .`"
        )
    _check_driver()
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        raise ImportError(
            f"the CUDA extension does not load with torch {torch.__version__}: {error}; "
            "install torch 2.10 or later with CUDA, or rebuild with "
            "`pip install --no-build-isolation .`"
        ) from error


def _check_driver() -> None:
    """The library holds CUDA's runtime, which a driver of an earlier major version refuses."""
    from granet_kernels import _native

    toolkit = str(_native.build_info()["cuda_toolkit"])
    driver = _driver_version()
    if driver is not None and driver // 1000 < int(toolkit.split(".")[0]):
        raise ImportError(
            f"the CUDA extension was built with CUDA {toolkit}, and the driver is one for "
            f"{driver // 1000}.{driver % 1000 // 10}: update the driver, or rebuild with an older toolkit"
        )


def _driver_version() -> int | None:
    """The latest CUDA that the driver knows, 12080 for 12.8; None without a driver.

    Of the driver itself: torch's own word for it is private, and not the same in all versions.
    """
    version = ctypes.c_int(0)
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    return version.value if status == 0 else None
