"""Recipes: each is a run, alone or with a method, and is found by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from granet import recipes
from granet.cli import main, make_parser
from granet.commands.train import settings
from granet.models import create_model
from granet.training.config import TrainConfig, build_config

METHODS = ("dense", "granet", "granet-dense", "gmp", "rigl", "set", "snip", "lottery-ticket")
DATA = tuple(name for name in recipes.names() if name not in METHODS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", DATA)
def test_every_pair_is_a_run(data: str, method: str) -> None:
    for sparsity in (0.8, 0.9, 0.95, 0.98):
        config = build_config(recipes.read(data), recipes.read(method), {"sparsity": sparsity})
        assert config.method == recipes.read(method)["method"]


def test_the_networks_are_there() -> None:
    for name in DATA:
        config = build_config(recipes.read(name))
        assert create_model(config.model, num_classes=2, in_channels=3)


def test_the_command_line_puts_them_together(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("lr: 0.3\nepochs: 7\n")
    line = f"train -c cifar10-vgg19 -c rigl -c {tmp_path}/own.yaml sparsity=0.95 amp=true epochs=9 --epochs 8"
    config, _ = settings(make_parser().parse_args(line.split()))
    expected = {"model": "vgg19_cifar", "method": "rigl", "lr": 0.3, "epochs": 8, "amp": True}
    assert {name: getattr(config, name) for name in expected} == expected
    assert (config.sparsity, config.weight_decay) == (0.95, 5e-4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train -c cifar10-vgg", "found none at cifar10-vgg; recipes: cifar10-vgg19"),
        ("train sparsity", "settings: expected KEY=VALUE, got 'sparsity'"),
        ("train sparsty=0.9", "settings: unknown key 'sparsty'; close: sparsity"),
        (
            "train sparsity=much",
            "sparsity: expected a number of at least 0 and below 1, got 'much'",
        ),
    ],
)
def test_what_is_no_recipe_is_one_line(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(line.split())
    assert message in capsys.readouterr().err


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{printed}" for name in recipes.names())
    assert TrainConfig().method in printed
