"""Image files in `train/<class>/` and `test/<class>/` (or `val/<class>/`), decoded when needed."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from .image_file import read_image
from .normalise import IMAGENET_MEAN, IMAGENET_STD, Normalise
from .sampling import (
    Share,
    check_position,
    count_train_batches,
    derive_seed,
    holdout_size,
    private_generator,
    stratified_holdout,
)

# The usual evaluation of ImageNet models resizes to 256 pixels and takes the middle 224.
RESIZE_RATIO = 256 / 224


class ImageFolderSource:
    """A `DataSource` over image files. See `load_data` for the arguments.

    Training images go through a random resized crop and a random flip; the others are resized and
    cropped in the middle. Normalised with ImageNet's statistics: those of the folder would cost
    decoding all of it.

    Raises:
        FileNotFoundError: `train/`, both of `test/` and `val/`, or the images of a class are
            missing.
        ValueError: the test split has other classes than the training split; a file (named) is no
            readable image.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        batch_size: int,
        device: torch.device,
        seed: int,
        val_split: float,
        workers: int,
        image_size: int,
        share: Share,
    ) -> None:
        train_folder, test_folder = _split_folders(data_dir)
        train, test = _scan(train_folder), _scan(test_folder)
        _check_same_classes(train, test)
        labels = torch.tensor(train.targets, dtype=torch.int64)
        kept, held_out = stratified_holdout(labels, holdout_size(len(labels), val_split))
        self.steps_per_epoch = count_train_batches(batch_size, len(kept), share.count)
        self.num_classes = len(train.classes)
        self.class_names: tuple[str, ...] = tuple(train.classes)
        self.sample_shape = (3, image_size, image_size)

        self._train_samples: list[tuple[str, int]] = train.samples
        self._test_samples: list[tuple[str, int]] = test.samples
        self._train = kept
        self._val: list[int] = held_out.tolist()
        self._train_transform = v2.Compose(
            [v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip(), v2.PILToTensor()]
        )
        self._plain_transform = v2.Compose(
            [
                v2.Resize(round(image_size * RESIZE_RATIO)),
                v2.CenterCrop(image_size),
                v2.PILToTensor(),
            ]
        )
        mean, std = ([255 * value for value in values] for values in (IMAGENET_MEAN, IMAGENET_STD))
        self._normalise = Normalise(mean, std, device)
        self._batch_size = batch_size
        self._device = device
        self._seed = seed
        self._workers = workers
        self._share = share

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled, augmented batches `start`, `start + 1`, … of `epoch`; see `DataSource`."""
        check_position(epoch, start, self.steps_per_epoch)
        permutation = torch.randperm(
            len(self._train), generator=private_generator(self._seed, epoch)
        )
        share, size = self._share, self._batch_size
        order = self._train[permutation[: self.steps_per_epoch * share.count * size]]
        batches = order.reshape(-1, size)[share.batch(start) :: share.count].tolist()
        samples = _Samples(self._train_samples, self._train_transform, self._seed, epoch)
        return self._load(samples, batches)

    def val_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out part of the training split, in order."""
        return self._plain_batches(self._train_samples, self._val)

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The test split, in order."""
        return self._plain_batches(self._test_samples, range(len(self._test_samples)))

    def _plain_batches(
        self, samples: Sequence[tuple[str, int]], indices: Sequence[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        share, size = self._share, self._batch_size
        batches = [
            list(indices[first : first + size])
            for first in range(share.index * size, len(indices), share.count * size)
        ]
        return self._load(_Samples(samples, self._plain_transform, self._seed, 0), batches)

    def _load(
        self, samples: "_Samples", batches: list[list[int]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if not batches:
            return
        loader = DataLoader(
            samples,
            batch_sampler=batches,
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            # Without one of its own the loader would draw from the global generator.
            generator=private_generator(self._seed),
            worker_init_fn=_end_with_the_main_process,
        )
        for images, labels in _start(loader):
            # uint8 to the device and float there: a quarter of the bytes to copy.
            images = images.to(self._device, non_blocking=True)
            yield self._normalise(images), labels.to(self._device, non_blocking=True)


def _start(loader: DataLoader[tuple[Tensor, int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Workers that ignore stop signals: those go to the whole process group, and only the main
    process knows when the batch under way is done.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        return iter(loader)  # workers inherit the blocked signals
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_the_main_process(_worker: int) -> None:
    """End this worker on a SIGTERM from the main process, which sends one when it exits.

    Blocked like any other, it would leave the main process waiting for its workers for ever.
    """
    main_process = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_process:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class _Samples(Dataset[tuple[Tensor, int]]):
    """Decoded images uint8 (3, H, W) with labels.

    The randomness of each depends on (seed, epoch, index) alone: not on the worker that prepares
    it, nor on what was prepared before.
    """

    def __init__(
        self, samples: Sequence[tuple[str, int]], transform: v2.Transform, seed: int, epoch: int
    ) -> None:
        self._samples = samples
        self._transform = transform
        self._seed = seed
        self._epoch = epoch

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self._samples[index]
        image = read_image(path)
        # torchvision's transforms know only the global generator of the CPU, which is put back
        # afterwards; torch.manual_seed would reseed GPUs as well.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self._seed, self._epoch, index))
            return self._transform(image), label


def _split_folders(data_dir: Path) -> tuple[Path, Path]:
    train = data_dir / "train"
    tests = [data_dir / "test", data_dir / "val"]
    test = next((folder for folder in tests if folder.is_dir()), None)
    if test is None or not train.is_dir():
        raise FileNotFoundError(
            f"data_dir: {data_dir} holds no image folder; "
            f"looked for the directory {train} and one of {tests[0]}, {tests[1]}"
        )
    return train, test


def _scan(folder: Path) -> ImageFolder:
    try:
        return ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"data_dir: {folder}/<class>/<image>: {error}") from error


def _check_same_classes(train: ImageFolder, test: ImageFolder) -> None:
    missing = sorted(set(train.classes) - set(test.classes))
    unknown = sorted(set(test.classes) - set(train.classes))
    if missing or unknown:
        raise ValueError(
            f"{test.root}: expected the class folders of {train.root}; "
            f"missing {missing}, not in train {unknown}"
        )
