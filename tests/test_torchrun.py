"""`granet train` under torchrun: several processes make the run, and the files, of one."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from granet.data import Share
from granet.training.checkpoint import load_checkpoint
from granet.training.processes import Processes, check_alike, started_by_torchrun
from tests.data_files import open_cpu, same, write_fashion_mnist
from tests.ranks import run_ranks

SETTINGS = [
    "--epochs", "2", "--grad-accum-steps", "2", "--log-interval", "0", "--warmup-epochs", "0.4",
    "--update-freq", "2", "--model-ema", "--model-ema-decay", "0.9",
]  # fmt: skip


def granet(*arguments: str, processes: int) -> subprocess.CompletedProcess[str]:
    """Run a command of the program in so many processes, or without torchrun."""
    starter = ["-m", "granet"]
    if processes > 1:
        starter = [
            "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *starter
        ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GRANET_BACKEND": "reference"}
    return subprocess.run(
        [sys.executable, *starter, *arguments],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def rows_of(directory: Path, table: str) -> list[dict[str, str]]:
    with (directory / table).open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_two_processes_train_stop_resume_and_evaluate(tmp_path: Path) -> None:
    """Two processes with 32 images see 20 of the batches each in an epoch: 10 steps of two."""
    run = [*SETTINGS, "--batch-size", "32", "--output", str(tmp_path), "--experiment"]
    whole = granet("train", *run, "whole", processes=2)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("test accuracy") == 1  # one process speaks
    assert " 20 steps on cpu x 2;" in whole.stdout

    stopped = granet("train", *run, "parts", "--stop-after", "13", processes=2)
    assert "stopped at step 13" in stopped.stderr
    resumed = granet("train", "--resume", str(tmp_path / "parts"), processes=2)
    assert resumed.returncode == 0, resumed.stderr
    for table in ("metrics.csv", "topology.csv"):
        assert rows_of(tmp_path / "parts", table) == rows_of(tmp_path / "whole", table)
    first, second = (load_checkpoint(tmp_path / run / "last.pt") for run in ("whole", "parts"))
    assert len(first.entries["other_rngs"]) == 1
    for name, value in first.network.items():
        assert torch.equal(second.network[name], value), name

    alone = granet("train", "--resume", str(tmp_path / "parts"), processes=1)
    assert alone.returncode == 2
    assert "expected a run of 1 processes, got one of 2" in alone.stderr

    results = [
        granet("train", "--resume", str(tmp_path / "parts"), "--eval-only", processes=processes)
        for processes in (1, 2)
    ]
    assert results[0].stdout == results[1].stdout
    best = rows_of(tmp_path / "parts", "metrics.csv")[-1]
    assert f"accuracy {float(best['val_acc']):.2f} %" in results[0].stdout


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_two_processes_take_the_steps_of_one_with_their_batches(tmp_path: Path) -> None:
    """Gradients, sums of images, masks: all but batch norm's statistics, which each has of its own."""
    run_ranks("passes", 2, tmp_path)


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_every_process_tests_the_best_epoch(tmp_path: Path) -> None:
    run_ranks("best_epoch", 2, tmp_path)


def test_processes_share_the_batches_of_an_epoch(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    whole = open_cpu("fashion-mnist", tmp_path)
    shares = [open_cpu("fashion-mnist", tmp_path, share=Share(index, 2)) for index in (0, 1)]
    assert [share.steps_per_epoch for share in shares] == [whole.steps_per_epoch // 2] * 2
    everything = list(whole.train_batches(3))
    for index, share in enumerate(shares):
        assert same(list(share.train_batches(3, start=1)), everything[2 + index : 4 : 2])
        assert same(list(share.test_batches()), list(whole.test_batches())[index::2])


def test_image_files_are_shared_alike(tmp_path: Path) -> None:
    from tests.data_files import write_image_folder

    write_image_folder(tmp_path)
    options: dict[str, Any] = {"image_size": 8}
    whole = open_cpu("imagefolder", tmp_path, **options)
    share = open_cpu("imagefolder", tmp_path, share=Share(1, 3), **options)
    everything = list(whole.train_batches(0))
    taken = share.steps_per_epoch * 3
    assert same(list(share.train_batches(0)), everything[1:taken:3])
    assert same(list(share.test_batches()), list(whole.test_batches())[1::3])


def test_too_large_a_batch_says_among_how_many(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    with pytest.raises(ValueError, match="at most the number of training images, 27, over 8 proc"):
        open_cpu("fashion-mnist", tmp_path, share=Share(0, 8))


class Two(Processes):
    """This process and another one, which has the same but for what is said."""

    other: ClassVar[dict[str, object]] = {}

    def collect(self, value: Any) -> list[Any]:
        return [value, value | self.other]


def test_settings_that_differ_between_processes_are_named() -> None:
    check_alike(Two(0, 2), {"lr": 0.1, "seed": 0})
    Two.other = {"seed": 1}
    message = "seed: expected the same in all processes, got 0 in process 0 and 1 in process 1"
    with pytest.raises(ValueError, match=message):
        check_alike(Two(0, 2), {"lr": 0.1, "seed": 0})
    Two.other = {}


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert started_by_torchrun() == Processes(0, 1, 0)
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    processes = started_by_torchrun()
    assert (processes.rank, processes.count, processes.local_rank) == (3, 4, 1)
    assert not processes.is_first
