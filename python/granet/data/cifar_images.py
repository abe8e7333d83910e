"""CIFAR as image files: `train/<class>/` and `test/<class>/` with an image of 32x32 pixels a file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .image_file import read_image

SPLITS = ("train", "test")
SUFFIXES = (".jpg", ".jpeg", ".png")


def has_image_folders(data_dir: Path) -> bool:
    """Whether there is a folder of training images; CIFAR-100's archive has a file of that name."""
    return (data_dir / SPLITS[0]).is_dir()


def read_split(folder: Path, class_names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, 32, 32), class by class in the order of their file names, and labels.

    Raises:
        FileNotFoundError: a class has no folder, or no image in it.
        ValueError: a file (named) is no image of 32x32 pixels.
        ImportError: Pillow is missing.
    """
    images, labels = [], []
    for label, name in enumerate(class_names):
        paths = sorted(path for path in (folder / name).glob("*") if path.suffix in SUFFIXES)
        if not paths:
            raise FileNotFoundError(
                f"data_dir: expected images ({', '.join(SUFFIXES)}) in {folder / name}, found none"
            )
        images += [_pixels(path) for path in paths]
        labels += [label] * len(paths)
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return stacked, torch.tensor(labels)


def _pixels(path: Path) -> np.ndarray:
    """uint8 (32, 32, 3)."""
    pixels = np.asarray(read_image(path))
    if pixels.shape != (32, 32, 3):
        height, width = pixels.shape[:2]
        raise ValueError(f"{path}: expected 32x32 pixels, got {width}x{height}")
    return pixels
