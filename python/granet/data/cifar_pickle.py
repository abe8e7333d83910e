"""CIFAR's python version: pickles, read without trusting them.

A pickle is a program: it calls whatever functions it names. Here it can name only the few that the
published files use, and each of these is replaced by one of ours that does nothing but carry bytes.
"""

import math
import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

IMAGE_BYTES = 3072


def read_cifar_pickle(path: Path, label_key: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (N, 3072) and labels int64 (M,) of one file; M is not checked against N.

    Raises:
        ValueError: not a pickle, one that names anything that CIFAR's files do not, or one without
            'data' and `label_key` of the right types and shapes.
    """
    content = path.read_bytes()
    try:
        batch = _CifarUnpickler(content).load()
    except Exception as error:  # a damaged pickle can raise almost any type
        raise ValueError(f"{path}: expected a pickled CIFAR batch: {error}") from error
    if not isinstance(batch, dict):
        raise ValueError(f"{path}: expected a pickled dict, got {type(batch).__name__}")
    # The published files were written by Python 2, whose strings arrive as bytes.
    batch = {
        key.decode("latin1") if isinstance(key, bytes) else key: value
        for key, value in batch.items()
    }
    missing = {"data", label_key} - batch.keys()
    if missing:
        raise ValueError(
            f"{path}: expected the keys 'data' and '{label_key}', got {sorted(map(str, batch))}"
        )
    return _pixels(path, batch["data"]), _labels(path, label_key, batch[label_key])


def _pixels(path: Path, data: object) -> np.ndarray:
    if not isinstance(data, _PickledArray):
        raise ValueError(f"{path}: expected 'data' to be an array, got {type(data).__name__}")
    shape, content = data.shape, data.content
    if len(shape) != 2 or shape[1] != IMAGE_BYTES or len(content) != math.prod(shape):
        raise ValueError(
            f"{path}: expected 'data' to be uint8 of shape (N, {IMAGE_BYTES}), "
            f"got {len(content)} bytes of shape {shape}"
        )
    return np.frombuffer(content, np.uint8).reshape(shape).copy()


def _labels(path: Path, label_key: str, labels: object) -> np.ndarray:
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError(f"{path}: expected '{label_key}' to be a list of integers")
    try:
        return np.array(labels, dtype=np.int64)
    except OverflowError as error:
        raise ValueError(f"{path}: expected '{label_key}' to be class numbers: {error}") from error


class _PickledArray:
    """Takes the place of numpy.ndarray: NumPy's own unpickling believes the shapes, sizes and flags
    it is given."""

    shape: tuple[int, ...] = ()
    content: bytes = b""

    def __setstate__(self, state: Any) -> None:
        _, shape, _, fortran_order, content = state
        if not isinstance(content, bytes) or not isinstance(shape, tuple) or fortran_order:
            raise pickle.UnpicklingError("it holds an array that is not plain bytes in C order")
        if not all(type(size) is int and size >= 0 for size in shape):
            raise pickle.UnpicklingError(f"it holds an array of shape {shape}")
        self.shape, self.content = shape, content


class _PickledDtype:
    """Takes the place of numpy.dtype, and says nothing more than its name, which is checked
    already."""

    def __setstate__(self, state: Any) -> None:
        pass


class _CifarUnpickler(pickle.Unpickler):
    def __init__(self, content: bytes) -> None:
        super().__init__(BytesIO(content), encoding="bytes")
        self._admitted = _admitted_names()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._admitted[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it refers to {module}.{name}, which no CIFAR file contains"
            ) from None


def _admitted_names() -> dict[tuple[str, str], object]:
    # Made anew for each file, because a pickle can set attributes on the functions it is given.
    def array(subtype: object, shape: object, typecode: object) -> _PickledArray:
        return _PickledArray()

    def dtype(name: object, align: object, copy: object) -> _PickledDtype:
        if name not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"it holds an array of {name!r}, not of bytes (u1)")
        return _PickledDtype()

    def encode(text: str, encoding: object) -> bytes:
        """How Python 3 writes bytes in the old pickle protocols."""
        if encoding not in ("latin1", b"latin1"):
            raise pickle.UnpicklingError(f"it encodes text as {encoding!r}, not as latin1")
        return text.encode("latin1")

    return {
        ("numpy.core.multiarray", "_reconstruct"): array,
        ("numpy._core.multiarray", "_reconstruct"): array,
        ("numpy", "ndarray"): object(),
        ("numpy", "dtype"): dtype,
        ("_codecs", "encode"): encode,
    }
