"""The shared library that holds the compiled operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).parents[2] / "_granet_ops.so"


def operator(name: str) -> Any:
    """A compiled operator, for who calls it so often that looking it up in torch.ops counts.

    Each of four attributes waits for memory, between two large tensors.

    Raises:
        ImportError: as :func:`load`, and where the library is of other sources.
    """
    load()
    try:
        return getattr(torch.ops.granet_cpp, name).default
    except AttributeError:
        raise ImportError(
            f"the compiled extension has no {name}: {LIBRARY.name} was built from other sources; "
            "rebuild with `pip install --no-build-isolation .`"
        ) from None


def load() -> None:
    """Load the library, which registers the operators of namespace ``granet_cpp``.

    Raises:
        ImportError: it is absent or does not load; the message says why and what to install.
    """
    if not LIBRARY.is_file():
        raise ImportError(
            f"the compiled extension is not installed: {LIBRARY.name} was not built, for want of a "
            "C++20 compiler or because of GRANET_BUILD_EXTENSION=0; install a C++20 compiler and "
            "run `pip install --no-build-isolation .`"
        )
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        raise ImportError(
            f"the compiled extension does not load with torch {torch.__version__}: {error}; "
            "install torch 2.10 or later, or rebuild with `pip install --no-build-isolation .`"
        ) from error
