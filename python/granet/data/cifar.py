"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) from the published archives, python or binary version,
unpacked, or from folders of image files."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .augment import Augmentation
from .cifar_images import SPLITS, has_image_folders, read_split
from .cifar_pickle import IMAGE_BYTES, read_cifar_pickle
from .files import check_labels, locate_files
from .in_memory import ImageSet

IMAGE_SHAPE = (3, 32, 32)

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
_CIFAR100_NAMES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
    crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
    keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
    mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain
    plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
    television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CIFAR100_CLASSES = tuple(_CIFAR100_NAMES.split())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Variant:
    """Where CIFAR-10 and CIFAR-100 differ."""

    class_names: tuple[str, ...]
    train_files: tuple[str, ...]
    """Names without suffix; the python version has none, the binary version `.bin`."""
    test_file: str
    folders: tuple[str, str]
    """What the two archives unpack to: python version, binary version."""
    label_key: str
    """Key of the labels in the python version."""
    label_bytes: int
    """Label bytes before each image in the binary version; the last one is the class."""


_CIFAR10 = _Variant(
    class_names=CIFAR10_CLASSES,
    train_files=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test_file="test_batch",
    folders=("cifar-10-batches-py", "cifar-10-batches-bin"),
    label_key="labels",
    label_bytes=1,
)
_CIFAR100 = _Variant(
    class_names=CIFAR100_CLASSES,
    train_files=("train",),
    test_file="test",
    folders=("cifar-100-python", "cifar-100-binary"),
    label_key="fine_labels",
    label_bytes=2,
)


def read_cifar10(data_dir: Path) -> ImageSet:
    """CIFAR-10 from `data_dir` or the folder in it that the archive unpacks to; or from image files
    in `train/airplane/`, `test/airplane/` and so on.

    Raises:
        FileNotFoundError: a file is missing; the message lists all that were looked for.
        ValueError: a file is damaged or holds anything but CIFAR images; the message names the
            file.
    """
    return _read(data_dir, _CIFAR10)


def read_cifar100(data_dir: Path) -> ImageSet:
    """CIFAR-100 with its 100 fine labels; otherwise as `read_cifar10`."""
    return _read(data_dir, _CIFAR100)


def _read(data_dir: Path, variant: _Variant) -> ImageSet:
    if has_image_folders(data_dir):
        batches = [read_split(data_dir / split, variant.class_names) for split in SPLITS]
    else:
        batches = [_read_batch(path, variant) for path in _archive_files(data_dir, variant)]
    return ImageSet(
        images=torch.cat([images for images, _ in batches]),
        labels=torch.cat([labels for _, labels in batches]),
        train_count=sum(len(labels) for _, labels in batches[:-1]),
        class_names=variant.class_names,
        augmentation=Augmentation(shift=4, flip=True),
    )


def _archive_files(data_dir: Path, variant: _Variant) -> list[Path]:
    """The training files, then the test file.

    Raises:
        FileNotFoundError: one is missing.
    """
    names = (*variant.train_files, variant.test_file)
    python_folder, binary_folder = variant.folders
    return locate_files(
        data_dir,
        [
            [f"{folder}{name}{suffix}" for name in names]
            for suffix, unpacked in (("", python_folder), (".bin", binary_folder))
            for folder in ("", f"{unpacked}/")
        ],
    )


def _read_batch(path: Path, variant: _Variant) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, 32, 32) and labels int64 (N,) of one file."""
    if path.suffix == ".bin":
        pixels, classes = _read_binary(path, variant.label_bytes)
    else:
        pixels, classes = read_cifar_pickle(path, variant.label_key)
    labels = torch.from_numpy(classes)
    check_labels(path, labels, len(pixels), len(variant.class_names))
    return torch.from_numpy(pixels).reshape(-1, *IMAGE_SHAPE), labels


def _read_binary(path: Path, label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    content = path.read_bytes()
    record = label_bytes + IMAGE_BYTES
    if not content or len(content) % record:
        raise ValueError(
            f"{path}: expected a positive multiple of {record} bytes, got {len(content)} bytes"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    return records[:, label_bytes:].copy(), records[:, label_bytes - 1].astype(np.int64)
