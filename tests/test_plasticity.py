"""`granet plasticity`: the two metrics, and what is pruned."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from granet.cli import main
from granet.plasticity import CRITERIA, Network, Study, measure
from granet_kernels import masked_layers
from tests.tiny_runs import WEIGHTS, tiny, tiny_config  # noqa: F401


def config(tmp_path: Path, **fields: Any) -> Any:
    return tiny_config(tmp_path, method="dense", **fields)


def test_metrics_are_differences_of_accuracies_that_training_gives(tmp_path: Path) -> None:
    """Pruning next to nothing is no prune: the copy goes on as the dense network does."""
    study = Study(
        epochs=(0, 2),
        rates=(1e-6, 0.9),
        criteria=("uniform",),
        regeneration=(False,),
        recover_epochs=1,
    )
    rows = list(measure(config(tmp_path), study))
    assert [(row.epoch, row.rate) for row in rows] == [(0, 1e-6), (0, 0.9), (2, 1e-6), (2, 0.9)]
    for row in rows:
        assert row.plasticity == row.accuracy_recovered - row.accuracy_before
        assert row.final_plasticity == row.accuracy_final - row.accuracy_dense
        assert row.lr == pytest.approx(build_lr(tmp_path, row.epoch))
    unpruned = [row for row in rows if row.rate == 1e-6]
    assert [row.final_plasticity for row in unpruned] == [0, 0]
    assert all(row.sparsity == 0 for row in unpruned)
    assert rows[3].final_plasticity < 0


def build_lr(tmp_path: Path, epoch: int) -> float:
    network = Network(config(tmp_path))
    return network.lr(5 * epoch)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("exchanged", [0.0, 0.5])
def test_what_is_pruned(tmp_path: Path, criterion: str, exchanged: float) -> None:
    network = Network(config(tmp_path))
    network.train(0)
    statistics = network.model[1].running_mean.clone()
    before = {name: m.weight.detach().clone() for name, m in masked_layers(network.model).items()}
    sparsity = network.prune(0.75, criterion, exchanged, epoch=1)
    assert torch.equal(network.model[1].running_mean, statistics)
    masks = {name: layer.mask for name, layer in masked_layers(network.model).items()}
    active = sum(int(mask.sum()) for mask in masks.values())
    assert sparsity == 1 - active / WEIGHTS
    if criterion != "filter":
        assert active == pytest.approx(WEIGHTS * 0.25, abs=2)
    if exchanged:
        return
    if criterion == "uniform":
        assert [int(mask.sum()) for mask in masks.values()] == [18, 352, 28]
    if criterion == "filter":
        assert all(
            (mask.flatten(1).all(1) | ~mask.flatten(1).any(1)).all() for mask in masks.values()
        )
    if criterion in ("uniform", "filter"):
        for name, mask in masks.items():
            size = (
                before[name].abs()
                if criterion == "uniform"
                else before[name].flatten(1).abs().sum(1)
            )
            kept = mask if criterion == "uniform" else mask.flatten(1).any(1)
            assert size[kept].min() >= size[~kept].max()


def test_the_command_writes_a_table_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    flags = "--prune-epochs 0,1 --rates 0.5,0.9 --recover-epochs 1 --epochs 2 --batch-size 256"
    assert main(["plasticity", *flags.split(), "--output", str(tmp_path)]) == 0
    directory = tmp_path / "digits-resnet_tiny-plasticity-0"
    with (directory / "plasticity.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2 * 2
    assert {row["regenerated"] for row in rows} == {"True", "False"}
    assert (directory / "plasticity.png").read_bytes().startswith(b"\x89PNG")
    assert "final_plasticity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--prune-epochs 40", "prune_epochs: expected epochs from 0 to 29, got 40"),
        ("--prune-epochs one", "prune_epochs: expected numbers between commas, got 'one'"),
        ("--prune-epochs 1 --rates 1.5", "rates: expected numbers in (0, 1), got 1.5"),
        (
            "--prune-epochs 1 --criteria best",
            "criteria: expected some of uniform, global, filter, random",
        ),
        ("--prune-epochs 1 --recover-epochs 0", "recover_epochs: expected at least 1, got 0"),
        (
            "--prune-epochs 1 --drop-fraction 2",
            "drop_fraction: expected a number in [0, 1], got 2.0",
        ),
    ],
)
def test_a_study_that_cannot_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    with pytest.raises(SystemExit):
        main(["plasticity", *flags.split(), "--output", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_a_study_is_the_same_twice(tmp_path: Path) -> None:
    study = Study(epochs=(1,), rates=(0.8,), criteria=("global",), recover_epochs=1)
    first, second = (list(measure(config(tmp_path), study)) for _ in range(2))
    assert list(map(dataclasses.asdict, first)) == list(map(dataclasses.asdict, second))
