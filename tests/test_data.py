"""The contract of DataSource, held by every data set."""

import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from granet.data import DATASETS, DataSource, load_data
from tests.data_files import WRITERS, counts, same

Open = Callable[..., DataSource]


@pytest.fixture(params=DATASETS)
def open_source(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """load_data for one data set, with small files of its format and small defaults."""
    name = request.param
    if name in WRITERS:
        WRITERS[name](tmp_path)
    defaults = {"data_dir": tmp_path, "batch_size": 4, "device": "cpu", "seed": 0, "image_size": 8}
    return lambda **options: load_data(name, **{**defaults, **options})


def global_state() -> list[object]:
    _, keys, *rest = np.random.get_state(legacy=True)
    return [torch.get_rng_state().tolist(), np.asarray(keys).tolist(), rest, random.getstate()]


def test_batches_have_the_promised_form(open_source: Open) -> None:
    source = open_source()
    assert len(source.class_names) == source.num_classes
    for batches in (
        islice(source.train_batches(0), 3),
        source.val_batches(),
        source.test_batches(),
    ):
        for images, labels in batches:
            assert images.dtype == torch.float32
            assert labels.dtype == torch.int64
            assert images.shape == (len(labels), *source.sample_shape)
            assert ((labels >= 0) & (labels < source.num_classes)).all()
            assert images.isfinite().all()


def test_train_drops_the_last_partial_batch(open_source: Open) -> None:
    source = open_source()
    sizes = [len(labels) for _, labels in source.train_batches(0)]
    assert sizes == [4] * source.steps_per_epoch


@pytest.mark.parametrize("start", [1, 2])
def test_resumed_epoch_continues_bit_for_bit(open_source: Open, start: int) -> None:
    whole = list(open_source(seed=5).train_batches(3))
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    resumed_source = open_source(seed=5)
    next(resumed_source.train_batches(1))
    assert same(list(resumed_source.train_batches(3, start)), whole[start:])


def test_iterators_do_not_disturb_each_other(open_source: Open) -> None:
    source = open_source()
    whole = list(source.train_batches(0))
    interleaved = [
        first for first, _ in zip(source.train_batches(0), source.train_batches(1), strict=True)
    ]
    assert same(interleaved, whole)


def test_global_random_state_is_untouched(open_source: Open) -> None:
    torch.manual_seed(1)
    before = global_state()
    source = open_source()
    first = next(source.train_batches(0))
    assert global_state() == before
    list(islice(source.train_batches(1), 3))
    list(source.val_batches())
    list(source.test_batches())
    assert global_state() == before
    torch.rand(3)
    assert same([next(source.train_batches(0))], [first])


def test_epochs_and_seeds_differ(open_source: Open) -> None:
    first = list(open_source(seed=0).train_batches(0))
    assert not same(first, list(open_source(seed=0).train_batches(1)))
    assert not same(first, list(open_source(seed=1).train_batches(0)))


def test_evaluation_is_the_same_for_every_seed_and_every_time(open_source: Open) -> None:
    source, other = open_source(seed=0), open_source(seed=1)
    val = list(source.val_batches())
    assert val
    assert same(val, list(other.val_batches()))
    assert same(list(source.test_batches()), list(other.test_batches()))
    assert same(val, list(source.val_batches()))


def test_without_val_split(open_source: Open) -> None:
    source = open_source(val_split=0)
    assert list(source.val_batches()) == []


def test_start_at_the_end_of_the_epoch_yields_nothing(open_source: Open) -> None:
    source = open_source()
    assert list(source.train_batches(0, source.steps_per_epoch)) == []


def test_positions_outside_the_run_are_refused(open_source: Open) -> None:
    source = open_source()
    steps = source.steps_per_epoch
    for start in (-1, steps + 1):
        with pytest.raises(ValueError, match=rf"start: expected .* \[0, {steps}\] .* got {start}"):
            source.train_batches(0, start)
    with pytest.raises(ValueError, match="epoch: expected a non-negative integer, got -1"):
        source.train_batches(-1)


def test_batch_larger_than_the_training_split(open_source: Open) -> None:
    match = r"batch_size: expected at most the number of training images, \d+, got 5000"
    with pytest.raises(ValueError, match=match):
        open_source(batch_size=5000)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"batch_size": 0}, ValueError, "batch_size: expected an integer of at least 1, got 0"),
        ({"batch_size": 2.5}, TypeError, "batch_size: expected an integer, got 2.5"),
        ({"batch_size": True}, TypeError, "batch_size: expected an integer, got True"),
        ({"seed": "0"}, TypeError, "seed: expected an integer, got '0'"),
        ({"workers": -1}, ValueError, "workers: expected an integer of at least 0, got -1"),
        ({"image_size": 0}, ValueError, "image_size: expected an integer of at least 1, got 0"),
        ({"val_split": 1.0}, ValueError, r"val_split: expected a number in \[0, 1\), got 1.0"),
        ({"val_split": -0.1}, ValueError, r"val_split: expected a number in \[0, 1\), got -0.1"),
        ({"val_split": float("nan")}, ValueError, r"val_split: expected .* got nan"),
    ],
)
def test_arguments_out_of_range(
    options: dict[str, object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        load_data("digits", **{"batch_size": 4, "device": "cpu", "seed": 0, **options})  # type: ignore[arg-type]


def test_unknown_name() -> None:
    names = "digits, fashion-mnist, cifar10, cifar100, imagefolder"
    with pytest.raises(ValueError, match=f"name: expected one of {names}, got 'mnist'"):
        load_data("mnist", batch_size=4, device="cpu", seed=0)


@pytest.mark.parametrize("name", WRITERS)
def test_data_dir_is_required(name: str) -> None:
    with pytest.raises(ValueError, match=f"data_dir: expected the directory that holds {name}"):
        load_data(name, batch_size=4, device="cpu", seed=0)


def test_digits_split() -> None:
    from sklearn.datasets import load_digits

    source = load_data("digits", batch_size=1, device="cpu", seed=0)
    train, val, test = (
        counts(batches)
        for batches in (source.train_batches(0), source.val_batches(), source.test_batches())
    )
    assert (sum(train), sum(val), sum(test)) == (1293, 144, 360)
    totals = np.bincount(load_digits().target)
    assert (np.array(train) + val + test == totals).all()
    assert np.abs(np.array(test) - totals * 360 / 1797).max() < 1
    assert source.sample_shape == (1, 8, 8)
    assert source.class_names == tuple("0123456789")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_sees_the_same_batches(open_source: Open) -> None:
    torch.cuda.init()
    before = torch.cuda.get_rng_state()
    source = open_source(device="cuda")
    expected = list(islice(open_source().train_batches(2), 5))
    batches = list(islice(source.train_batches(2), 5))
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert all(images.is_cuda and labels.is_cuda for images, labels in batches)
    for (images, labels), (cpu_images, cpu_labels) in zip(batches, expected, strict=True):
        torch.testing.assert_close(images.cpu(), cpu_images)
        assert torch.equal(labels.cpu(), cpu_labels)


def test_a_holdout_of_no_image_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"val_split: expected 0, or a share .* one of 1437 samples"
    ):
        load_data("digits", batch_size=8, device=torch.device("cpu"), seed=0, val_split=0.0001)
