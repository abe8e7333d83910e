"""The files of Fashion-MNIST and CIFAR: read in each published form, refused where damaged or missing."""

import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from granet.data.cifar import CIFAR10_CLASSES
from granet.data.idx import read_idx
from tests.data_files import (
    WRITERS,
    open_cpu,
    pixels,
    python2_pickle,
    write_cifar10,
    write_fashion_mnist,
    write_idx,
)


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


def write_cifar10_images(folder: Path) -> np.ndarray:
    """Two images a class in each split; the test images (20, 32, 32, 3), class by class."""
    data = pixels(20, 32, 32, 3)
    for split in ("train", "test"):
        for index, image in enumerate(data):
            path = folder / split / CIFAR10_CLASSES[index // 2] / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return data


def test_cifar_image_files(tmp_path: Path) -> None:
    data = write_cifar10_images(tmp_path)
    source = open_cpu("cifar10", tmp_path)
    images, labels = (torch.cat(part) for part in zip(*source.test_batches(), strict=True))
    assert [int(label) for label in labels] == [index // 2 for index in range(20)]
    assert correlation(images[:, 2], data[..., 2]) == 1
    assert source.class_names == CIFAR10_CLASSES


@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (lambda path: path.write_bytes(b"text"), ValueError, "expected a readable image"),
        (
            lambda path: Image.new("RGB", (28, 32)).save(path),
            ValueError,
            "expected 32x32 pixels, got 28x32",
        ),
        (
            lambda path: shutil.rmtree(path.parent),
            FileNotFoundError,
            "expected images .* in .*truck, found none",
        ),
    ],
    ids=["no image", "size", "missing class"],
)
def test_damaged_cifar_image_files(
    tmp_path: Path, damage: Callable[[Path], object], error: type[Exception], match: str
) -> None:
    write_cifar10_images(tmp_path)
    damage(tmp_path / "test" / "truck" / "18.png")
    with pytest.raises(error, match=match):
        open_cpu("cifar10", tmp_path)


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
