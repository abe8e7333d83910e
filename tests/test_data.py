"""The contract of DataSource, held by every data set, its parts, and each file format.

All files are written here, small, in the published formats.
"""

import gzip
import os
import pickle
import random
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from granet.data import DATASETS, DataSource, load_data
from granet.data.augment import Augmentation
from granet.data.idx import read_idx
from granet.data.in_memory import ImageSet, InMemorySource
from granet.data.normalise import channel_statistics
from granet.data.sampling import derive_seed, stratified_holdout

Batches = list[tuple[Tensor, Tensor]]
Open = Callable[..., DataSource]


def pixels(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape)
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion_mnist(folder: Path, suffix: str = ".gz") -> None:
    for split, count in (("train", 30), ("t10k", 10)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        write_idx(folder / f"{split}-images-idx3-ubyte{suffix}", pixels(count, 6, 5))
        write_idx(folder / f"{split}-labels-idx1-ubyte{suffix}", labels)


def python2_pickle(key: str, labels: list[int], data: np.ndarray) -> bytes:
    """{key: labels, "data": data}, opcode by opcode as Python 2 wrote the published files."""

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()  # SHORT_BINSTRING

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text("b") + b"\x87R"
        b"(K\x01" + b"".join(map(integer, data.shape)) + b"\x86"
        b"cnumpy\ndtype\n" + text("u1") + b"K\x00K\x01\x87R"
        b"(K\x03" + text("|") + b"NNN" + 2 * integer(-1) + b"K\x00tb"
        b"\x89T" + struct.pack("<i", data.nbytes) + data.tobytes() + b"tb"
    )
    numbers = b"](" + b"".join(map(integer, labels)) + b"e"
    return b"\x80\x02}(" + text(key) + numbers + text("data") + array + b"u."


def write_cifar10(folder: Path) -> None:
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(python2_pickle("labels", list(range(10)), pixels(10, 3072)))


def write_cifar100(folder: Path) -> None:
    folder = folder / "cifar-100-python"
    folder.mkdir()
    for name, count in (("train", 40), ("test", 10)):
        labels = [99 - index % 20 for index in range(count)]
        (folder / name).write_bytes(python2_pickle("fine_labels", labels, pixels(count, 3072)))


def write_image_folder(folder: Path, test: str = "test") -> None:
    for split, count in (("train", 20), (test, 5)):
        for number, name in enumerate(("cat", "dog")):
            (folder / split / name).mkdir(parents=True)
            for index, image in enumerate(pixels(2, count, 12, 10 + number, 3)[number]):
                Image.fromarray(image).save(folder / split / name / f"{index:02}.png")


WRITERS = {
    "fashion-mnist": write_fashion_mnist,
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "imagefolder": write_image_folder,
}


@pytest.fixture(params=DATASETS)
def open_source(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """load_data for one data set, with small files of its format and small defaults."""
    name = request.param
    if name in WRITERS:
        WRITERS[name](tmp_path)
    defaults = {"data_dir": tmp_path, "batch_size": 4, "device": "cpu", "seed": 0, "image_size": 8}
    return lambda **options: load_data(name, **{**defaults, **options})


def same(left: Batches, right: Batches) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True)
    )


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


def counts(batches: Iterator[tuple[Tensor, Tensor]]) -> list[int]:
    return torch.bincount(torch.cat([labels for _, labels in batches])).tolist()


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


def open_cpu(name: str, data_dir: Path, **options: object) -> DataSource:
    return load_data(name, data_dir=data_dir, batch_size=5, device="cpu", seed=0, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("folder", [".", "FashionMNIST/raw"])
def test_fashion_mnist(tmp_path: Path, folder: str, suffix: str) -> None:
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    write_fashion_mnist(tmp_path / folder, suffix)
    source = open_cpu("fashion-mnist", tmp_path)
    assert (source.sample_shape, source.num_classes) == ((1, 6, 5), 10)
    images, labels = (torch.cat(part) for part in zip(*source.test_batches(), strict=True))
    assert labels.tolist() == list(range(10))
    assert correlation(images[:, 0], pixels(10, 6, 5)) == 1


def correlation(images: Tensor, raw: np.ndarray) -> float:
    """1 where the images are an increasing linear function of the raw ones, pixel by pixel."""
    stacked = np.stack([images.flatten().numpy().astype(np.float64), raw.flatten()])
    return round(float(np.corrcoef(stacked)[0, 1]), 5)


def test_idx_reads_values_and_dimensions(tmp_path: Path) -> None:
    array = pixels(3, 4, 5)
    write_idx(tmp_path / "file", array)
    assert (read_idx(tmp_path / "file", 3).numpy() == array).all()


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        (
            "train-images-idx3-ubyte",
            lambda b: b[:-1],
            r"expected 916 bytes for dimensions \(30, 6, 5\), got 915",
        ),
        ("train-images-idx3-ubyte", lambda b: b + b"0", "expected 916 bytes .* got 917"),
        (
            "train-images-idx3-ubyte",
            lambda b: b[:9],
            "expected an idx header of 16 bytes, got a file of 9",
        ),
        (
            "t10k-labels-idx1-ubyte",
            lambda b: b"\0\0\x0d" + b[3:],
            "magic number 0x00000801 .* got 0x00000d01",
        ),
        ("t10k-labels-idx1-ubyte", lambda b: b[:-1] + b"\x0a", r"labels in \[0, 10\), got \[10\]"),
        (
            "train-labels-idx1-ubyte",
            lambda b: b"\0\0\x08\1\0\0\0\2ab",
            "got 2 labels for 30 images",
        ),
        (
            "t10k-images-idx3-ubyte",
            lambda b: b[:11] + b"\5" + b[12:15] + b"\6" + b[16:],
            r"\(6, 5\) pixels as in train",
        ),
    ],
)
def test_damaged_idx_files(
    tmp_path: Path, name: str, change: Callable[[bytes], bytes], match: str
) -> None:
    write_fashion_mnist(tmp_path, "")
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / name))}: .*{match}"):
        open_cpu("fashion-mnist", tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:10] + b"\xff" * 20,
        lambda content: b"no gzip file",
    ],
    ids=["truncated", "bad block", "other format"],
)
def test_damaged_gzip_file(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    write_fashion_mnist(tmp_path)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: expected a complete gzip file"):
        open_cpu("fashion-mnist", tmp_path)


def pickle_protocol_2(key: str, labels: object, data: object) -> bytes:
    return pickle.dumps({key.encode(): labels, b"data": data}, protocol=2)


@pytest.mark.parametrize("write", [python2_pickle, pickle_protocol_2])
@pytest.mark.parametrize("folder", ["cifar-10-batches-py", "."])
def test_cifar_pickles(tmp_path: Path, folder: str, write: Callable[..., bytes]) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    write_cifar10(tmp_path / folder)
    data = pixels(3, 3072)
    (tmp_path / folder / "test_batch").write_bytes(write("labels", [9, 0, 4], data))
    source = open_cpu("cifar10", tmp_path)
    assert (source.sample_shape, source.num_classes) == ((3, 32, 32), 10)
    [(images, labels)] = source.test_batches()
    assert [source.class_names[label] for label in labels] == ["truck", "airplane", "deer"]
    for channel in range(3):
        assert correlation(images[:, channel], data.reshape(3, 3, 1024)[:, channel]) == 1


@pytest.mark.parametrize(
    ("name", "files", "folder", "prefix"),
    [
        (
            "cifar10",
            [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"],
            "cifar-10-batches-bin",
            b"",
        ),
        ("cifar100", ["train", "test"], "cifar-100-binary", b"\x63"),
    ],
)
def test_cifar_binary_files(
    tmp_path: Path, name: str, files: list[str], folder: str, prefix: bytes
) -> None:
    (tmp_path / folder).mkdir()
    data = pixels(10, 3072)
    content = b"".join(prefix + bytes([index]) + row.tobytes() for index, row in enumerate(data))
    for file in files:
        (tmp_path / folder / f"{file}.bin").write_bytes(content)
    images, labels = (
        torch.cat(part) for part in zip(*open_cpu(name, tmp_path).test_batches(), strict=True)
    )
    assert labels.tolist() == list(range(10))
    assert correlation(images[:, 1], data.reshape(10, 3, 1024)[:, 1]) == 1
    path = tmp_path / folder / "test" if name == "cifar100" else tmp_path / folder / "test_batch"
    path = path.with_suffix(".bin")
    path.write_bytes(content[:-1])
    record = 3073 + len(prefix)
    match = f"expected a positive multiple of {record} bytes, got {10 * record - 1}"
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: {match}"):
        open_cpu(name, tmp_path)


class Malicious:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, ("hacked",)


GOOD = python2_pickle("labels", [0], pixels(1, 3072))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (
            pickle.dumps(Malicious(), protocol=2),
            r"it refers to (posix|nt).mkdir, which no CIFAR file contains",
        ),
        (b"cnumpy\nload\n(S'hacked'\ntR.", "it refers to numpy.load"),
        (b"c_codecs\nencode\n(VeA==\nVbase64\ntR.", "it encodes text as 'base64', not as latin1"),
        (
            pickle_protocol_2("labels", [0], np.zeros((1, 3072))),
            "it holds an array of 'f8', not of bytes",
        ),
        (pickle_protocol_2("labels", [0], pixels(2, 3072).T), "not plain bytes in C order"),
        (GOOD[:-100], "expected a pickled CIFAR batch"),
        (b"", "expected a pickled CIFAR batch"),
        (pickle.dumps([1, 2], protocol=2), "expected a pickled dict, got list"),
        (
            python2_pickle("fine_labels", [0], pixels(1, 3072)),
            "expected the keys 'data' and 'labels', got .*fine_labels",
        ),
        (
            python2_pickle("labels", [0], pixels(1, 3071)),
            r"uint8 of shape \(N, 3072\), got 3071 bytes of shape \(1, 3071\)",
        ),
        (GOOD.replace(b"J\1\0\0\0J", b"J\2\0\0\0J"), r"got 3072 bytes of shape \(2, 3072\)"),
        (pickle_protocol_2("labels", [0], "text"), "expected 'data' to be an array, got str"),
        (
            pickle_protocol_2("labels", ["cat"], pixels(1, 3072)),
            "expected 'labels' to be a list of integers",
        ),
        (
            pickle_protocol_2("labels", [1 << 70], pixels(1, 3072)),
            "expected 'labels' to be class numbers",
        ),
        (python2_pickle("labels", [0, 1], pixels(1, 3072)), "got 2 labels for 1 images"),
        (python2_pickle("labels", [10], pixels(1, 3072)), r"labels in \[0, 10\), got \[10\]"),
    ],
)
def test_refused_cifar_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, match: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path)
    path = tmp_path / "data_batch_3"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{match}"):
        open_cpu("cifar10", tmp_path)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("name", "gone", "others"),
    [
        (
            "fashion-mnist",
            "t10k-labels-idx1-ubyte.gz",
            ["train-images-idx3-ubyte.gz", "FashionMNIST/raw/train-labels-idx1-ubyte"],
        ),
        (
            "cifar10",
            "data_batch_4",
            [
                "data_batch_1",
                "cifar-10-batches-py/test_batch",
                "cifar-10-batches-bin/data_batch_5.bin",
            ],
        ),
        ("cifar100", "cifar-100-python/test", ["train.bin", "cifar-100-python/train"]),
        ("imagefolder", "test", ["train", "val"]),
    ],
)
def test_missing_files_are_listed(tmp_path: Path, name: str, gone: str, others: list[str]) -> None:
    WRITERS[name](tmp_path)
    (tmp_path / gone).rename(tmp_path / "elsewhere")
    for data_dir in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            FileNotFoundError, match=f"data_dir: {re.escape(str(data_dir))} "
        ) as caught:
            open_cpu(name, data_dir, image_size=8)
        for file in (gone, *others):
            assert str(data_dir / file) in str(caught.value)


def test_missing_and_found_files_are_told_apart(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "test_batch").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        open_cpu("cifar10", tmp_path)
    assert f"missing {tmp_path}/test_batch\n" in str(caught.value)
    assert f"found   {tmp_path}/data_batch_1\n" in str(caught.value)


@pytest.mark.parametrize("start", [0, 3])
def test_imagefolder_does_not_depend_on_the_number_of_workers(tmp_path: Path, start: int) -> None:
    write_image_folder(tmp_path, test="val")
    alone, two = (open_cpu("imagefolder", tmp_path, image_size=8, workers=n) for n in (0, 2))
    assert same(list(two.train_batches(1, start)), list(alone.train_batches(1))[start:])
    if start == 0:
        assert same(list(two.val_batches()), list(alone.val_batches()))
        assert same(list(two.test_batches()), list(alone.test_batches()))


def test_imagefolder_augments_anew_in_every_epoch_and_seed(tmp_path: Path) -> None:
    # One training image, so that no shuffle can make the batches differ.
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.fromarray(pixels(30, 30, 3)).save(tmp_path / split / "cat" / "0.png")
    seen = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        source = load_data(
            "imagefolder",
            data_dir=tmp_path,
            batch_size=1,
            device="cpu",
            seed=seed,
            val_split=0,
            image_size=8,
        )
        seen.append(next(source.train_batches(epoch))[0])
    assert not any(torch.equal(seen[i], seen[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_imagefolder_splits_and_pixels(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    (tmp_path / "val").mkdir()  # test/ is preferred
    for path in (tmp_path / "test").glob("*/*.png"):
        Image.new("L", (20, 16), 255).save(path)
    source = open_cpu("imagefolder", tmp_path, image_size=8)
    assert (source.class_names, source.sample_shape) == (("cat", "dog"), (3, 8, 8))
    assert counts(source.val_batches()) == [2, 2]
    assert counts(source.test_batches()) == [5, 5]
    white = next(source.test_batches())[0]
    expected = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(white, expected[:, None, None].expand(5, 3, 8, 8))


def test_imagefolder_bad_folders(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "wolf")
    match = (
        r"test: expected the class folders of .*train; missing \['dog'\], not in train \['wolf'\]"
    )
    with pytest.raises(ValueError, match=match):
        open_cpu("imagefolder", tmp_path, image_size=8)
    for path in (tmp_path / "train" / "cat").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"data_dir: .*train/<class>/<image>: .*cat"):
        open_cpu("imagefolder", tmp_path, image_size=8)


@pytest.mark.parametrize("workers", [0, 1])
def test_imagefolder_names_an_unreadable_image(tmp_path: Path, workers: int) -> None:
    write_image_folder(tmp_path)
    path = tmp_path / "test" / "dog" / "02.png"
    path.write_bytes(path.read_bytes()[:60])
    source = open_cpu("imagefolder", tmp_path, image_size=8, workers=workers)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: expected a readable image"):
        list(source.test_batches())


def test_the_process_ends_while_a_worker_still_runs(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    script = f"""
import sys, torch
from granet.data import load_data
source = load_data("imagefolder", data_dir={str(tmp_path)!r}, batch_size=1, device="cpu", seed=0,
                   image_size=8, workers=1)
batches = source.test_batches()
next(batches)
sys.keep = batches  # alive until the interpreter has gone, as in the traceback of an error
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_holdout_of_no_image_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"val_split: expected 0, or a share .* one of 1437 samples"
    ):
        load_data("digits", batch_size=8, device=torch.device("cpu"), seed=0, val_split=0.0001)
