"""The handwritten digits that ship inside scikit-learn (UCI Optical Recognition of Handwritten
Digits, test part)."""

import torch

from .augment import Augmentation
from .in_memory import ImageSet
from .sampling import stratified_holdout

TEST_COUNT = 360


def read_digits() -> ImageSet:
    """1797 grey images of 8x8 pixels with values 0..16, kept as they are; 1437 to train on and 360
    to test on.

    The set has no published split: this one is stratified and the same in every run.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "name: the data set 'digits' is part of scikit-learn, which is not installed; "
            "install the [train] extra"
        ) from error
    bunch = load_digits()
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    images = torch.from_numpy(bunch.images).to(torch.uint8)[:, None]
    train, test = stratified_holdout(labels, TEST_COUNT)
    order = torch.cat([train, test])
    return ImageSet(
        images=images[order],
        labels=labels[order],
        train_count=len(train),
        class_names=tuple(str(name) for name in bunch.target_names),
        augmentation=Augmentation(shift=1),
    )
