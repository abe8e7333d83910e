"""A data set that fits on the training device: one uint8 tensor, indexed and augmented there."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .augment import Augmentation
from .normalise import Normalise, channel_statistics
from .sampling import (
    Share,
    check_position,
    count_train_batches,
    holdout_size,
    private_generator,
    stratified_holdout,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSet:
    """A data set as it was published."""

    images: Tensor
    """uint8 (N, C, H, W); the training split comes first, then the test split."""

    labels: Tensor
    """int64 (N,), indices into `class_names`."""

    train_count: int
    """Number of images in the training split."""

    class_names: tuple[str, ...]

    augmentation: Augmentation
    """What the training images of this set go through."""


class InMemorySource:
    """A `DataSource` over an `ImageSet`. See `load_data` for the arguments."""

    def __init__(
        self,
        image_set: ImageSet,
        *,
        batch_size: int,
        device: torch.device,
        seed: int,
        val_split: float,
        share: Share = Share(),  # noqa: B008 - it cannot change
    ) -> None:
        train_count = image_set.train_count
        train_labels = image_set.labels[:train_count]
        train, val = stratified_holdout(train_labels, holdout_size(train_count, val_split))
        self.steps_per_epoch = count_train_batches(batch_size, len(train), share.count)
        self.num_classes = len(image_set.class_names)
        self.class_names = image_set.class_names
        channels, height, width = image_set.images.shape[1:]
        self.sample_shape = (channels, height, width)

        self._images = image_set.images.to(device)
        self._labels = image_set.labels.to(device)
        self._train = train.to(device)
        self._val = val.to(device)
        self._test = torch.arange(train_count, len(image_set.labels), device=device)
        # Of the whole training split: the network's input then does not depend on val_split.
        statistics = channel_statistics(image_set.images[:train_count])
        self._normalise = Normalise(*statistics, device)
        self._augmentation = image_set.augmentation
        self._batch_size = batch_size
        self._device = device
        self._seed = seed
        self._share = share

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled, augmented batches `start`, `start + 1`, … of `epoch`; see `DataSource`."""
        check_position(epoch, start, self.steps_per_epoch)
        return self._train_batches(epoch, start)

    def val_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out part of the training split, in order."""
        return self._plain_batches(self._val)

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The test split, in order."""
        return self._plain_batches(self._test)

    def _train_batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        # An epoch's randomness is drawn at once: any batch can then be reached without its
        # predecessors, and a GPU gets it in two copies an epoch instead of two a step.
        generator = private_generator(self._seed, epoch)
        count = len(self._train)
        order = self._train[torch.randperm(count, generator=generator).to(self._device)]
        moves = self._augmentation.draw(count, generator).to(self._device)
        for step in range(start, self.steps_per_epoch):
            first = self._share.batch(step) * self._batch_size
            rows = slice(first, first + self._batch_size)
            images = self._augmentation.apply(self._images[order[rows]], moves[rows])
            yield self._normalise(images), self._labels[order[rows]]

    def _plain_batches(self, indices: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        share, size = self._share, self._batch_size
        for first in range(share.index * size, len(indices), share.count * size):
            picked = indices[first : first + size]
            yield self._normalise(self._images[picked]), self._labels[picked]
