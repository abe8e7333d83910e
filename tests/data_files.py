"""Small data sets in the published formats, and what tests do with them."""

import gzip
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from granet.data import DataSource, load_data

Batches = list[tuple[Tensor, Tensor]]


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


def same(left: Batches, right: Batches) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True)
    )


def counts(batches: Iterator[tuple[Tensor, Tensor]]) -> list[int]:
    return torch.bincount(torch.cat([labels for _, labels in batches])).tolist()


def open_cpu(name: str, data_dir: Path, **options: object) -> DataSource:
    return load_data(name, data_dir=data_dir, batch_size=5, device="cpu", seed=0, **options)  # type: ignore[arg-type]
