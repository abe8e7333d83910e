"""`granet sweep`: which runs, that it goes on where it was, and its table."""

from __future__ import annotations

from pathlib import Path

import pytest

from granet import recipes
from granet.cli import main
from granet.commands import sweep as sweeping
from granet.commands.sweep import points, table
from granet.paper import DENSE, FIGURES, figure
from granet.training.stopping import Stopped
from tests.tiny_runs import tiny  # noqa: F401

LINE = [
    "sweep", "--methods", "dense,granet,rigl,snip", "--sparsities", "0.8,0.9", "--seeds", "0,1",
    "epochs=2", "batch_size=256", "update_freq=2", "log_interval=0",
]  # fmt: skip


def test_points_are_every_combination_and_dense_once_a_seed() -> None:
    found = points({"epochs": 2}, {}, ["dense", "gmp"], [0.8, 0.9], [3, 4], "runs/x")
    names = [point.config.run_directory.name for point in found]
    assert names == ["dense-3", "gmp-0.8-3", "gmp-0.9-3", "dense-4", "gmp-0.8-4", "gmp-0.9-4"]
    assert [point.config.sparsity for point in found[1:3]] == [0.8, 0.9]
    assert all(point.config.epochs == 2 for point in found)


def test_what_is_typed_wins_over_a_recipe_and_a_recipe_over_a_file() -> None:
    base = {"drop_fraction": 0.2, "lr": 0.2}
    [file] = points(base, {}, ["granet-dense"], [0.9], [0], "x")
    assert (file.config.drop_fraction, file.config.lr) == (0.5, 0.2)
    [typed] = points(base, {"drop_fraction": 0.1, "lr": 0.3}, ["granet-dense"], [0.9], [0], "x")
    assert (typed.config.drop_fraction, typed.config.lr) == (0.1, 0.3)


def test_a_method_needs_no_recipe() -> None:
    [static] = points({}, {}, ["static"], [0.9], [0], "x")
    assert static.config.method == "static"


def test_a_sweep_that_was_stopped_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*LINE, "--output", str(tmp_path)]
    trained: list[str] = []
    train_point = sweeping.train_point

    def stops(point: sweeping.Point) -> None:
        if len(trained) == 3:
            raise Stopped(tmp_path / "last.pt", 1, 2)
        trained.append(point.config.run_directory.name)
        train_point(point)

    monkeypatch.setattr(sweeping, "train_point", stops)
    assert main(line) == 130
    assert "or repeat the sweep, which goes on" in capsys.readouterr().err
    monkeypatch.setattr(sweeping, "train_point", train_point)
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.yaml")}
    assert len(finished) == 3
    assert main(line) == 0
    printed = capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    assert len(list(tmp_path.rglob("summary.yaml"))) == 2 * (1 + 3 * 2)
    rows = [row for row in printed.splitlines() if row.startswith(("dense ", "granet ", "rigl "))]
    assert [row.split()[:2] for row in rows if "on digits" not in row] == [
        ["dense", "0"], ["granet", "0.8"], ["granet", "0.9"], ["rigl", "0.8"], ["rigl", "0.9"],
    ]  # fmt: skip


def test_the_table_sets_the_papers_figures_beside_ours(tmp_path: Path) -> None:
    found = points(
        {"dataset": "digits", "epochs": 1, "batch_size": 256, "log_interval": 0}, {},
        ["snip"], [0.9], [0], str(tmp_path),
    )  # fmt: skip
    sweeping.train_point(found[0])
    [row] = table(found)
    assert (row[0], row[1], row[3], row[-1]) == ("snip", "0.9", "1", "-")


def test_figures_have_their_provenance() -> None:
    for dataset, model in FIGURES:
        assert f"{dataset}-{model.removesuffix('_cifar')}" in recipes.names()
        assert (dataset, model) in DENSE
    assert str(figure("cifar10", "vgg19_cifar", "granet-dense", 0.9)) == "93.80 (second source)"
    assert str(figure("cifar10", "vgg19_cifar", "granet", 0.9)) == "93.73 (recalled)"
    assert str(figure("cifar100", "resnet50_cifar", "dense", 0.0)) == "78.23 (second source)"
    assert figure("cifar100", "resnet50_cifar", "granet", 0.9) is None
    assert set().union(*FIGURES.values()) <= set(recipes.names())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "digits"], "files of settings, got 'digits'"),
        (
            ["--methods", "grant"],
            "methods: expected some of dense, gmp, granet, granet-dense, grasp,",
        ),
        (["--seeds", "1.5"], "seeds: expected whole numbers between commas, got '1.5'"),
        (["--seed", "3"], "seed: a sweep takes --seeds, got '3'"),
        (["method=rigl"], "method: a sweep takes --methods, got 'rigl'"),
        (["--sparsities", "high"], "sparsities: expected numbers between commas, got 'high'"),
    ],
)
def test_a_sweep_that_cannot_be(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["sweep", *flags])
    assert message in capsys.readouterr().err


def test_a_finished_run_of_other_settings_is_not_taken_for_one_of_these(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [
        "sweep", "--methods", "gmp,gmp", "--sparsities", "0.9", "--seeds", "0,0", "epochs=1",
        "batch_size=256", "update_freq=2", "log_interval=0", "--output", str(tmp_path),
    ]  # fmt: skip
    assert main(line) == 0
    assert "[1/1]" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*line, "lr=0.2"])
    assert "settings differ: lr: 0.1 in the checkpoint, 0.2 now" in capsys.readouterr().err
