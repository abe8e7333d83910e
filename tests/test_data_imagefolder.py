"""Folders of images: workers, augmentation, splits, and what cannot be read."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from granet.data import load_data
from tests.data_files import counts, open_cpu, pixels, same, write_image_folder


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
