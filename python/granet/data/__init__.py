"""Image data for training: one function, `load_data`, and one protocol, `DataSource`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .cifar import read_cifar10, read_cifar100
from .digits import read_digits
from .idx import read_fashion_mnist
from .in_memory import ImageSet, InMemorySource
from .sampling import Share, derive_seed

__all__ = ["DATASETS", "DataSource", "Share", "derive_seed", "load_data"]

_FILE_READERS: dict[str, Callable[[Path], ImageSet]] = {
    "fashion-mnist": read_fashion_mnist,
    "cifar10": read_cifar10,
    "cifar100": read_cifar100,
}

DATASETS = ("digits", *_FILE_READERS, "imagefolder")
"""The names that `load_data` knows."""


class DataSource(Protocol):
    """Batches of images float32 (N, C, H, W), normalised, and labels int64 (N,), on one device.

    What is random depends on (seed, epoch, position in the epoch) alone. Global random state is
    neither read nor written, so that a run resumed in the middle of an epoch sees bit-identical
    batches.
    """

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are in [0, num_classes)."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in the order of the labels."""

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of training batches that this process sees in an epoch."""

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches in its random order, augmented; the last partial batch is dropped.

        Args:
            epoch: number of the epoch, from 0.
            start: batches of this epoch already consumed, in [0, steps_per_epoch]; the iterator
                goes on after them.
        """

    def val_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The part held out of the training split, neither augmented nor shuffled.

        The last batch may be smaller than the others.
        """

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The test split, in the manner of `val_batches`."""


def load_data(
    name: str,
    *,
    data_dir: str | Path | None = None,
    batch_size: int,
    device: torch.device | str,
    seed: int,
    val_split: float = 0.1,
    workers: int = 0,
    image_size: int = 224,
    share: Share = Share(),  # noqa: B008 - it cannot change
) -> DataSource:
    """Open a data set.

    Args:
        name: one of `DATASETS`.
        data_dir: directory with the data set's files; not used by "digits", which ships with
            scikit-learn.
        batch_size: images a batch, at most the number of training images.
        device: where batches are wanted. All but "imagefolder" keep the whole set there as uint8.
        seed: of the order and the augmentation of the training images, and of nothing else.
        val_split: fraction of the training split that is held out, in [0, 1), the same in every
            class; which images does not depend on `seed`. With 0 `val_batches` yields nothing.
        workers: processes that decode images ("imagefolder" only); 0 decodes in the caller's.
        image_size: side in pixels of the square images ("imagefolder" only).
        share: which of the batches are this process's; together, processes see each image once.

    Raises:
        ValueError, TypeError: an argument is out of range, or a file (named) is damaged.
        FileNotFoundError: files are missing; lists all that were looked for.
    """
    if name not in DATASETS:
        raise ValueError(f"name: expected one of {', '.join(DATASETS)}, got {name!r}")
    _check_integer("batch_size", batch_size, 1)
    _check_integer("seed", seed)
    _check_integer("workers", workers, 0)
    _check_integer("image_size", image_size, 1)
    if not 0 <= val_split < 1:
        raise ValueError(f"val_split: expected a number in [0, 1), got {val_split}")
    device = torch.device(device)
    if name == "imagefolder":
        try:  # only here: torchvision and Pillow are slow to import and not needed otherwise
            from .imagefolder import ImageFolderSource
        except ImportError as error:
            raise ImportError(
                "name: the data set 'imagefolder' is read with torchvision, which cannot be "
                f"imported ({error}); install the [train] extra"
            ) from error

        return ImageFolderSource(
            _directory(name, data_dir),
            batch_size=batch_size,
            device=device,
            seed=seed,
            val_split=val_split,
            workers=workers,
            image_size=image_size,
            share=share,
        )
    return InMemorySource(
        _read_image_set(name, data_dir),
        batch_size=batch_size,
        device=device,
        seed=seed,
        val_split=val_split,
        share=share,
    )


def _read_image_set(name: str, data_dir: str | Path | None) -> ImageSet:
    if name == "digits":
        return read_digits()
    return _FILE_READERS[name](_directory(name, data_dir))


def _check_integer(name: str, value: object, least: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value}")


def _directory(name: str, data_dir: str | Path | None) -> Path:
    if data_dir is None:
        raise ValueError(
            f"data_dir: expected the directory that holds {name}, got None (granet train --data-dir DIR)"
        )
    return Path(data_dir)
