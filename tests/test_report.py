"""The report: weights counted by hand, runs of several seeds in one row."""

from __future__ import annotations

import argparse
import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from granet import cli
from granet.commands import report, tables
from granet.training import runs
from granet.training.checkpoint import ENTRIES, get_rng_state, save_checkpoint
from granet.training.config import TrainConfig
from granet.training.telemetry import Summary, read_summary, write_summary
from granet_kernels import pack_mask


def masked_state(weight: list[float], mask: list[int]) -> dict[str, Tensor]:
    return {
        "conv.weight": torch.tensor(weight).view(1, -1),
        "conv.packed_mask": pack_mask(torch.tensor(mask, dtype=torch.bool).view(1, -1)),
        "conv.bias": torch.zeros(1),
        "norm.weight": torch.zeros(4),
        "excluded.weight": torch.zeros(2, 2),
    }


def test_counting_by_hand() -> None:
    counted = runs.count_weights(masked_state([1, 0, -0.0, 2, 0], [1, 0, 0, 1, 1]), "x.pt")
    assert counted == runs.WeightCount(total=5, zero=3, inactive=2)
    assert counted.active == 3
    assert counted.sparsity == 0.4
    dense = {"conv.weight": torch.ones(2, 3), "norm.weight": torch.zeros(4)}
    assert runs.count_weights(dense, "x.pt") == runs.WeightCount(total=6, zero=0, inactive=0)


def test_a_revived_weight_is_an_error() -> None:
    message = r"x\.pt: conv\.weight: expected zeros where the mask is off, got 1 weights"
    with pytest.raises(ValueError, match=message):
        runs.count_weights(masked_state([1, 0, 3], [1, 0, 0]), "x.pt")


def make_run(
    directory: Path,
    *,
    finished: bool = True,
    weight: tuple[float, ...] = (1, 0, 2, 0),
    mask: tuple[int, ...] = (1, 0, 1, 0),
    **fields: Any,
) -> Path:
    """A run directory with a checkpoint of four weights."""
    results = {name: fields.pop(name) for name in ("test_acc", "seconds") if name in fields}
    config = TrainConfig(experiment=directory.name, **fields)
    directory.mkdir()
    state = masked_state(list(weight), list(mask))
    if config.method == "dense":
        state = {"conv.weight": torch.ones(1, 4)}
    entries: dict[str, Any] = dict.fromkeys(ENTRIES)
    entries |= {
        "config": dataclasses.asdict(config),
        "model": state,
        "progress": dict.fromkeys(("epoch", "batch", "step", "total_steps"), 0)
        | {"seconds": 5.0, "running": torch.zeros(3), "best_epoch": None},
        "optimizer": {"state": {}, "param_groups": []},
        "rng": get_rng_state(),
        "flops": {"sparse_total": 1.0, "dense_total": 4},
    }
    save_checkpoint(directory / "last.pt", entries)
    active = 4 if config.method == "dense" else sum(mask)
    summary = Summary(
        checkpoint="last.pt", epoch=3, val_acc=90.0, test_acc=95.0, test_loss=0.1,
        sparsity=1 - active / 4, active_weights=active, total_weights=4, steps=10,
        inference_flops_ratio=active / 4, train_flops_ratio=0.75, seconds=10.0,
    )  # fmt: skip
    if finished:
        summary = dataclasses.replace(summary, **results)
        write_summary(directory / "summary.yaml", summary)
        assert read_summary(directory / "summary.yaml") == summary
    return directory


def test_seeds_make_one_row(tmp_path: Path) -> None:
    paths = [
        make_run(tmp_path / "a0", seed=0, test_acc=90.0, seconds=10.0),
        make_run(tmp_path / "dense", method="dense", test_acc=97.5),
        make_run(tmp_path / "a1", seed=1, test_acc=92.0, seconds=14.0),
    ]
    header, rows = report.table([runs.read_run(path) for path in paths])
    assert header == list(report.COLUMNS)
    assert rows == [
        ["granet", "0.5000", "91.00 ± 1.41", "2", "0.750", "0.500", "12.0 ± 2.8", "2"],
        ["dense", "0.0000", "97.50", "4", "0.750", "1.000", "10.0", "1"],
    ]


def test_what_else_differs_gets_a_column(tmp_path: Path) -> None:
    paths = [
        make_run(tmp_path / "a", lr=0.1, workers=3, update_freq=5),
        make_run(tmp_path / "b", lr=0.2),
        make_run(tmp_path / "c", method="dense", init_sparsity=0.1),
    ]
    header, rows = report.table([runs.read_run(path) for path in paths])
    assert header[:5] == ["method", "sparsity", "test acc. %", "lr", "update_freq"]
    assert [[row[0], *row[3:5]] for row in rows] == [
        ["granet", "0.1", "5"],
        ["granet", "0.2", "2%"],
        ["dense", "0.1", "-"],
    ]


def test_an_unfinished_run_shows_what_there_is(tmp_path: Path) -> None:
    run = runs.read_run(make_run(tmp_path / "a", finished=False))
    _, rows = report.table([run])
    expected = ["granet", "0.5000", "-", "2", "0.250", "-", "5.0", "1 (1 unfinished)"]
    assert rows == [expected]


def test_a_summary_that_does_not_match_the_checkpoint_is_an_error(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "a")
    summary = dataclasses.replace(read_summary(directory / "summary.yaml"), active_weights=3)
    write_summary(directory / "summary.yaml", summary)
    with pytest.raises(
        ValueError, match=r"expected 3 active weights as in summary\.yaml, counted 2"
    ):
        runs.read_run(directory)
    (directory / "summary.yaml").write_text("epochs: 3")
    with pytest.raises(ValueError, match=r"summary\.yaml: expected a summary of a granet run"):
        runs.read_run(directory)


def test_the_last_line_says_whether_counts_agree(tmp_path: Path) -> None:
    good = runs.read_run(make_run(tmp_path / "good"))
    [line] = report.agreement([good, good])
    assert line.endswith("what the runs printed: 2.")
    stray = runs.read_run(make_run(tmp_path / "stray", weight=(1, 0, 0, 0)))
    assert report.agreement([good, stray]) == [
        f"{tmp_path / 'stray'}: 1 active weights are exactly 0, besides the 2 inactive ones"
    ]


def test_plain_columns_line_up() -> None:
    assert tables.render_plain(["method", "n"], [["granet", "1,000"], ["d", "2"]]) == (
        "method      n\n"
        "------  -----\n"
        "granet  1,000\n"
        "d           2"
    )  # fmt: skip


def test_runs_are_found_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "b", seed=1)
    make_run(tmp_path / "a")
    assert runs.find_runs(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    assert runs.find_runs(tmp_path / "b") == [tmp_path / "b"]
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    table = tmp_path / "table.csv"
    assert report.run(parser.parse_args([str(tmp_path), "--csv", str(table)])) == 0
    assert "Zero weights counted" in capsys.readouterr().out
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["seed"]) for row in rows] == [
        (str(tmp_path / "a"), "0"),
        (str(tmp_path / "b"), "1"),
    ]
    assert {row["result_test_acc"] for row in rows} == {"95.0"}
    assert {row["counted_zero_weights"] for row in rows} == {"2"}


def test_a_terminal_gets_a_drawn_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    tables.show(["method", "n"], [["granet", "1"]])
    assert "───" in capsys.readouterr().out


def test_runs_of_other_processes_are_another_setup(tmp_path: Path) -> None:
    """Two processes have twice the batch."""
    one = runs.read_run(make_run(tmp_path / "one", seed=0))
    two = dataclasses.replace(runs.read_run(make_run(tmp_path / "two", seed=1)), processes=2)
    header, rows = report.table([one, two])
    assert header[3] == "processes"
    assert [row[3] for row in rows] == ["1", "2"]


def test_a_seed_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run that has finished, or the first."""
    make_run(tmp_path / "a", seed=0, finished=False)
    make_run(tmp_path / "b", seed=0, test_acc=80.0)
    make_run(tmp_path / "c", seed=0, test_acc=80.0)
    make_run(tmp_path / "d", seed=1, test_acc=82.0)
    assert cli.main(["report", str(tmp_path), "--csv", str(tmp_path / "new" / "all.csv")]) == 0
    printed = capsys.readouterr().out
    assert "81.00 ± 1.41" in printed
    for name in "ac":
        assert (
            f"{tmp_path / name}: left out, the same setup and seed as {tmp_path / 'b'}" in printed
        )
    assert f"{tmp_path / 'new' / 'all.csv'}: 4 runs" in printed
