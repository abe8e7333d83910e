"""The parts of a source in memory: split, seeds, augmentation, normalisation, shuffle."""

import pytest
import torch

from granet.data.augment import Augmentation
from granet.data.in_memory import ImageSet, InMemorySource
from granet.data.normalise import channel_statistics
from granet.data.sampling import derive_seed, stratified_holdout


def test_stratified_holdout_is_exact_disjoint_and_pinned() -> None:
    labels = torch.tensor([0] * 10 + [1] * 5 + [2] * 1)
    kept, held = stratified_holdout(labels, 8)
    assert sorted(kept.tolist() + held.tolist()) == list(range(16))
    assert torch.bincount(labels[held], minlength=3).tolist() == [5, 3, 0]
    # Another selection would silently change what every later run is evaluated on.
    assert held.tolist() == [1, 2, 3, 4, 7, 11, 12, 14]
    assert [len(part) for part in stratified_holdout(labels, 0)] == [16, 0]
    assert [len(part) for part in stratified_holdout(labels, 16)] == [0, 16]
    with pytest.raises(ValueError, match=r"count: expected an integer in \[0, 16\], got 17"):
        stratified_holdout(labels, 17)


def test_derived_seeds() -> None:
    assert derive_seed(1, 2) == derive_seed(1, 2)
    seeds = {derive_seed(a, b) for a in range(30) for b in range(30)} | {
        derive_seed(1),
        derive_seed(12),
    }
    assert len(seeds) == 902
    assert all(0 <= seed < 2**64 for seed in seeds)


@pytest.mark.parametrize(("shift", "flip"), [(0, False), (1, False), (0, True), (2, True)])
def test_augmentation_moves_each_image_on_its_own(shift: int, flip: bool) -> None:
    augmentation = Augmentation(shift=shift, flip=flip)
    images = torch.randint(1, 256, (400, 2, 5, 4), dtype=torch.uint8)
    moves = augmentation.draw(400, torch.Generator().manual_seed(0))
    moved = augmentation.apply(images, moves)
    assert moved.dtype == torch.uint8
    for image, (row, column, mirrored), got in zip(images, moves.tolist(), moved, strict=True):
        padded = torch.zeros(2, 5 + 2 * shift, 4 + 2 * shift, dtype=torch.uint8)
        padded[:, shift : shift + 5, shift : shift + 4] = image
        expected = padded[:, row : row + 5, column : column + 4]
        assert torch.equal(got, expected.flip(2) if mirrored else expected)
    assert moves[:, :2].unique().tolist() == list(range(2 * shift + 1))
    assert moves[:, 2].unique().tolist() == ([0, 1] if flip else [0])


def test_train_images_are_shifted_and_the_others_are_not() -> None:
    image_set = ImageSet(
        images=torch.full((60, 1, 4, 4), 7, dtype=torch.uint8),
        labels=torch.arange(60) % 2,
        train_count=50,
        class_names=("a", "b"),
        augmentation=Augmentation(shift=1),
    )
    source = InMemorySource(
        image_set, batch_size=10, device=torch.device("cpu"), seed=0, val_split=0.2
    )
    first, second, *_ = [images for images, _ in source.train_batches(0)]
    assert first.unique().tolist() == [-7.0, 0.0]  # the mean is 7; shifting brings in zeros
    assert not torch.equal(first, second)  # the images are all the same: only the moves differ
    for batches in (source.val_batches(), source.test_batches()):
        assert torch.cat([images for images, _ in batches]).unique().tolist() == [0.0]


def test_normalised_by_the_training_split() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (90, 3, 6, 6), dtype=torch.uint8, generator=generator)
    images[:, 1] //= 3
    train = images[:80].double()
    means, deviations = channel_statistics(images[:80])
    torch.testing.assert_close(means, train.mean((0, 2, 3)).tolist())
    torch.testing.assert_close(deviations, train.std((0, 2, 3), correction=0).tolist())
    image_set = ImageSet(
        images=images,
        labels=torch.zeros(90, dtype=torch.int64),
        train_count=80,
        class_names=("a",),
        augmentation=Augmentation(),
    )
    source = InMemorySource(
        image_set, batch_size=80, device=torch.device("cpu"), seed=0, val_split=0
    )
    [(batch, _)] = source.train_batches(0)
    torch.testing.assert_close(batch.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.std((0, 2, 3), correction=0), torch.ones(3))
    [(batch, _)] = source.test_batches()
    expected = (images[80:] - torch.tensor(means)[:, None, None]) / torch.tensor(deviations)[
        :, None, None
    ]
    torch.testing.assert_close(batch, expected.float())


def test_every_training_image_once_an_epoch() -> None:
    # Images that carry their number as their only grey value: the shuffle can be read off.
    numbers = torch.arange(40, dtype=torch.uint8)
    image_set = ImageSet(
        images=numbers[:, None, None, None].expand(40, 1, 2, 2).contiguous(),
        labels=numbers.long(),
        train_count=32,
        class_names=tuple(str(number) for number in range(40)),
        augmentation=Augmentation(flip=True),
    )
    source = InMemorySource(
        image_set, batch_size=8, device=torch.device("cpu"), seed=0, val_split=0
    )
    images, labels = (torch.cat(part) for part in zip(*source.train_batches(0), strict=True))
    assert sorted(labels.tolist()) == list(range(32))
    assert labels.tolist() != list(range(32))
    assert torch.equal(images[:, 0, 0, 0].argsort(), labels.argsort())
    assert [len(labels) for _, labels in source.test_batches()] == [8]
