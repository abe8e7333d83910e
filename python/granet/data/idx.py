"""The idx file format of MNIST, and Fashion-MNIST in it (Xiao, Rasul and Vollgraf, 2017).

A file is two zero bytes, a type code (8: unsigned byte), the number of dimensions, each dimension
as a big-endian 32-bit integer, and the values, the last dimension fastest.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .augment import Augmentation
from .files import check_labels, locate_files
from .in_memory import ImageSet

UNSIGNED_BYTE = 0x08

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip

_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_LAYOUTS = [
    [f"{folder}{name}{suffix}" for name in _NAMES]
    for folder in ("", "FashionMNIST/raw/")
    for suffix in (".gz", "")
]


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The uint8 tensor in an idx file, which may be compressed (`.gz`).

    Raises:
        ValueError: not a gzip file, not an idx file of unsigned bytes with that many dimensions, or
            not as long as its dimensions say.
    """
    content = _read_bytes(path)
    magic = UNSIGNED_BYTE << 8 | dimensions
    header_size = 4 + 4 * dimensions
    if len(content) < header_size:
        raise ValueError(
            f"{path}: expected an idx header of {header_size} bytes, "
            f"got a file of {len(content)} bytes"
        )
    found, *shape = struct.unpack_from(f">{1 + dimensions}I", content)
    if found != magic:
        raise ValueError(
            f"{path}: expected the idx magic number 0x{magic:08x} "
            f"({dimensions} dimensions of unsigned bytes), got 0x{found:08x}"
        )
    expected = header_size + math.prod(shape)
    if len(content) != expected:
        raise ValueError(
            f"{path}: expected {expected} bytes for dimensions {tuple(shape)}, "
            f"got {len(content)} bytes"
        )
    return torch.from_numpy(
        np.frombuffer(content, np.uint8, offset=header_size).reshape(shape).copy()
    )


def read_fashion_mnist(data_dir: Path) -> ImageSet:
    """Fashion-MNIST's four idx files, `.gz` or not, from `data_dir` or its `FashionMNIST/raw`.

    Raises:
        FileNotFoundError: a file is missing; the message lists all that were looked for.
        ValueError: a file is damaged, or the files do not fit together; the message names the file.
    """
    paths = locate_files(data_dir, _LAYOUTS)
    train_images, train_labels = _read_split(*paths[:2])
    test_images, test_labels = _read_split(*paths[2:])
    if train_images.shape[1:] != test_images.shape[1:]:
        raise ValueError(
            f"{paths[2]}: expected images of {tuple(train_images.shape[1:])} pixels "
            f"as in {paths[0].name}, got {tuple(test_images.shape[1:])}"
        )
    return ImageSet(
        images=torch.cat([train_images, test_images])[:, None],
        labels=torch.cat([train_labels, test_labels]),
        train_count=len(train_labels),
        class_names=FASHION_MNIST_CLASSES,
        augmentation=Augmentation(shift=2, flip=True),
    )


def _read_split(images_path: Path, labels_path: Path) -> tuple[Tensor, Tensor]:
    images = read_idx(images_path, 3)
    labels = read_idx(labels_path, 1).to(torch.int64)
    check_labels(labels_path, labels, len(images), len(FASHION_MNIST_CLASSES))
    return images, labels


def _read_bytes(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a complete gzip file: {error}") from error
