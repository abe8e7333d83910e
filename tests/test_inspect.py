"""`granet inspect`: it finds what was put into a checkpoint that should not be there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from granet.cli import main
from granet.training.train import train
from granet_kernels import pack_mask, unpack_mask
from tests.tiny_runs import tiny, tiny_config  # noqa: F401

Entries = dict[str, Any]


def inactive(entries: Entries, layer: str) -> torch.Tensor:
    weight = entries["model"][f"{layer}.weight"]
    return ~unpack_mask(entries["model"][f"{layer}.packed_mask"], weight.shape)


def revive(entries: Entries) -> None:
    weight = entries["model"]["5.weight"]
    weight[tuple(inactive(entries, "5").nonzero()[:3].T)] = 0.5


def negate(entries: Entries) -> None:
    weight = entries["model"]["5.weight"]
    weight[tuple(inactive(entries, "5").nonzero()[:2].T)] = -0.0


def poison(entries: Entries) -> None:
    weight = entries["model"]["6.weight"]
    weight[tuple((~inactive(entries, "6")).nonzero()[0])] = torch.nan


def kill(entries: Entries) -> None:
    model = entries["model"]
    mask = unpack_mask(model["0.packed_mask"], model["0.weight"].shape)
    mask[2:5] = False
    model["0.packed_mask"] = pack_mask(mask)
    model["0.weight"] *= mask
    entries["sparsifier"]["masks"]["0"] = model["0.packed_mask"]


def empty(entries: Entries) -> None:
    model = entries["model"]
    model["6.packed_mask"] = torch.zeros_like(model["6.packed_mask"])
    model["6.weight"] *= 0


def stale(entries: Entries) -> None:
    momentum = entries["optimizer"]["state"][3]["momentum_buffer"]  # the first linear layer's
    momentum[tuple(inactive(entries, "5").nonzero()[:4].T)] = 1.0


PLANTED: dict[str, tuple[Callable[[Entries], None], str]] = {
    "revived": (revive, "PROBLEM 5: 3 inactive weights are not zero"),
    "negative zero": (negate, "PROBLEM 5: 2 inactive weights are -0.0"),
    "NaN": (poison, "PROBLEM 6: 1 weights are NaN or infinite"),
    "dead": (kill, "PROBLEM 0: 3 of 8 output channels are dead"),
    "empty": (empty, "PROBLEM 6: no weight is active"),
    "masks": (empty, "PROBLEM 6: the sparsifier's mask is not the model's"),
    "stale": (stale, "PROBLEM 5: momentum_buffer is not zero for 4 inactive weights"),
    "budget": (kill, "weights are active, erk gives it"),
}


def inspected(path: Path, capsys: pytest.CaptureFixture[str], *more: Path) -> tuple[int, str]:
    capsys.readouterr()
    status = main(["inspect", *map(str, (path, *more))])
    return status, capsys.readouterr().out


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    config = tiny_config(tmp_path, method="rigl", sparsity=0.6, epochs=1)
    train(config)
    return config.run_directory


def test_a_run_is_in_order(run_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, printed = inspected(run_directory, capsys)
    assert status == 0
    assert "rigl resnet_tiny on digits, seed 0: step 5 of 5, 1 epochs" in printed
    assert "636 of 1,590 weights active, sparsity 0.6000" in printed
    assert printed.endswith("In order.\n")
    assert inspected(run_directory / "last.pt", capsys, run_directory)[0] == 0


@pytest.mark.parametrize("name", PLANTED)
def test_what_was_planted_is_found(
    run_directory: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    plant, message = PLANTED[name]
    entries = torch.load(run_directory / "last.pt", weights_only=True)
    plant(entries)
    torch.save(entries, run_directory / "planted.pt")
    status, printed = inspected(run_directory / "planted.pt", capsys)
    assert status == 1
    assert message in printed


def test_masks_that_drifted_apart(run_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = torch.load(run_directory / "last.pt", weights_only=True)
    kill(entries)
    torch.save(entries, run_directory / "rank1.pt")
    status, printed = inspected(run_directory / "last.pt", capsys, run_directory / "rank1.pt")
    assert status == 1
    assert "PROBLEM 0: masks of" in printed


def test_a_dense_run_is_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path, method="dense", epochs=1)
    train(config)
    assert inspected(config.run_directory, capsys) == (
        0,
        inspected(config.run_directory, capsys)[1],
    )
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "nothing")])
