"""What makes the order of the data a pure function of a few integers.

Every random choice comes from a generator made here for that choice alone, so the global generators
of PyTorch, NumPy and Python are neither read nor written, and a resumed run needs no generator
state to see the same data.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

HOLDOUT_SEED = 1797
"""Fixes which samples are held out; a constant, so that runs with different seeds are evaluated on
the same data."""


@dataclass(frozen=True, slots=True)
class Share:
    """Of every `count` batches in turn, the one that one of `count` processes sees."""

    index: int = 0
    count: int = 1

    def batch(self, step: int) -> int:
        """Number, among all batches of an epoch, of this process's batch in a step."""
        return step * self.count + self.index


def derive_seed(*keys: int) -> int:
    """A 64-bit seed from any integers; the same keys give the same seed on every machine."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def private_generator(*keys: int) -> torch.Generator:
    """A generator seeded from `keys`; a CPU one, so that its draws are the same on every device."""
    return torch.Generator().manual_seed(derive_seed(*keys))


def stratified_holdout(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Split sample indices into kept and held out, with every class in proportion.

    Args:
        labels: int64 (N,), class of each sample.
        count: how many samples to hold out, exactly, in [0, N].

    Returns:
        Two ascending int64 tensors of N - count and count indices. A class of n samples loses
        n * count / N of them, rounded up or down.
    """
    if not 0 <= count <= len(labels):
        raise ValueError(f"count: expected an integer in [0, {len(labels)}], got {count}")
    classes = labels.cpu().numpy()
    # NumPy promises never to change this stream; PyTorch makes no such promise for its own.
    shuffled = np.random.RandomState(HOLDOUT_SEED).permutation(len(classes))
    by_class = shuffled[np.argsort(classes[shuffled], kind="stable")]
    sizes = np.bincount(classes)
    first = np.cumsum(sizes) - sizes
    rank = np.arange(len(classes)) - first[classes[by_class]]
    # Taking the lowest relative ranks takes the same fraction of every class.
    relative_rank = (rank + 0.5) / sizes[classes[by_class]]
    chosen = by_class[np.argsort(relative_rank, kind="stable")]
    return torch.from_numpy(np.sort(chosen[count:])), torch.from_numpy(np.sort(chosen[:count]))


def holdout_size(count: int, fraction: float) -> int:
    """Number of samples in a `fraction` of `count`, rounded to the nearest integer.

    Raises:
        ValueError: a fraction above 0 comes to no sample.
    """
    size = round(count * fraction)
    if fraction > 0 and size == 0:
        raise ValueError(
            f"val_split: expected 0, or a share that holds out one of {count} samples, got {fraction}"
        )
    return size


def count_train_batches(batch_size: int, train_count: int, processes: int = 1) -> int:
    """Full batches that each process sees in an epoch; what is left over is dropped.

    Raises:
        ValueError: not even one batch is full.
    """
    if batch_size * processes > train_count:
        among = f", over {processes} processes" if processes > 1 else ""
        raise ValueError(
            f"batch_size: expected at most the number of training images, {train_count}{among}, "
            f"got {batch_size}"
        )
    return train_count // (batch_size * processes)


def check_position(epoch: int, start: int, steps_per_epoch: int) -> None:
    """Refuse a negative epoch and a start outside [0, steps_per_epoch]."""
    if epoch < 0:
        raise ValueError(f"epoch: expected a non-negative integer, got {epoch}")
    if not 0 <= start <= steps_per_epoch:
        raise ValueError(
            f"start: expected an integer in [0, {steps_per_epoch}] (batches), got {start}"
        )
