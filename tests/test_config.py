"""TrainConfig: its checks, its flags, its YAML, and which of them wins."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from pydantic import ValidationError

from granet.commands.flags import add_flags, flags_given
from granet.training import build
from granet.training.config import (
    GROUPS,
    TrainConfig,
    build_config,
    field_schemas,
    read_config_file,
    resume_conflicts,
    write_config_file,
)


def parse(*flags: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return flags_given(parser.parse_args(flags))


def test_every_field_has_a_docstring_and_one_place_in_the_help() -> None:
    fields = [field.name for field in dataclasses.fields(TrainConfig)]
    assert [name for name, schema in field_schemas().items() if schema["description"]] == fields
    assert sorted(" ".join(GROUPS.values()).split()) == sorted(fields)


def test_help_names_every_flag_and_its_default() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    text = " ".join(parser.format_help().split())
    for name in field_schemas():
        assert f"--{name.replace('_', '-')}" in text
    assert "-b N, --batch-size N" in text
    assert "Time between two updates of the masks (default: 2%)" in text
    assert "0 loads them in this one (default: 0)" in text
    assert "%%" not in text


SHARE = "a number of at least 0 and below 1"
COUNT = "a whole number above 0"
BAD_VALUES = {
    "sparsity": (1.2, SHARE),
    "init_sparsity": (0.95, "a number from 0 to the final sparsity 0.9"),
    "method": (
        "rigel",
        "one of dense, granet, gmp, rigl, rigl-itop, set, static, snip, grasp, synflow, "
        "lottery-ticket, one-shot",
    ),
    "epochs": (0, COUNT),
    "batch_size": (2.5, COUNT),
    "grad_accum_steps": (True, COUNT),
    "workers": (-1, "a whole number of at least 0"),
    "lr": (True, "a number above 0"),
    "momentum": (float("nan"), SHARE),
    "weight_decay": (float("inf"), "a number of at least 0"),
    "warmup_epochs": (-1.0, "a number of at least 0"),
    "smoothing": (1, SHARE),
    "clip_grad": (0, "a number above 0 or none"),
    "drop_fraction": ("half", "a number or none"),
    "score_batches": ("none", COUNT),
    "val_split": (0, "a number above 0 and below 1"),
    "update_freq": (0.5, "a whole number or text"),
    "prune_end": (True, "a whole number or text or none"),
    "dataset": ("mnist", "one of digits, fashion-mnist, cifar10, cifar100, imagefolder"),
    "amp": ("maybe", "true or false"),
    "data_dir": (3, "text or none"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_a_bad_value_is_named_and_shown(name: str) -> None:
    value, expected = BAD_VALUES[name]
    message = f"{name}: expected {expected}, got {value!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build_config({name: value})
    with pytest.raises(ValidationError):
        TrainConfig(**{name: value})
    with pytest.raises(ValidationError):
        dataclasses.replace(TrainConfig(), **{name: value})


def test_all_bad_values_are_in_one_line() -> None:
    expected = (
        "epochs: expected a whole number above 0, got 0; lr: expected a number above 0, got 'fast'"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        build_config({"lr": "fast"}, {"epochs": 0})


def test_text_is_read_as_the_type_of_its_field() -> None:
    given: dict[str, object] = {
        "lr": "1e-2", "epochs": "3", "clip_grad": "none", "amp": "yes", "nesterov": "no",
        "update_freq": "20", "prune_end": "75%", "experiment": "3", "data_dir": "None",
    }  # fmt: skip
    fields = dataclasses.asdict(build_config(given))
    assert {name: fields[name] for name in given} == {
        "lr": 0.01, "epochs": 3, "clip_grad": None, "amp": True, "nesterov": False,
        "update_freq": 20, "prune_end": "75%", "experiment": "3", "data_dir": None,
    }  # fmt: skip


def test_a_configuration_cannot_change_and_has_no_other_fields() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().lr = 0.2  # type: ignore[misc]
    with pytest.raises(ValidationError, match="rate"):
        TrainConfig(rate=0.2)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="config: unknown key 'epoch'; close: epochs"):
        build_config({"epoch": 3})


def test_a_dense_run_ignores_the_initial_sparsity() -> None:
    assert TrainConfig(method="dense", sparsity=0.0, init_sparsity=0.5).init_sparsity == 0.5


def test_a_setting_that_a_method_does_not_have_is_refused() -> None:
    message = "grow: rigl has no such setting; it has distribution, erk_power, floor, drop_fraction"
    with pytest.raises(ValueError, match=f"^{message}"):
        build_config({"method": "rigl", "grow": "random"})
    with pytest.raises(ValueError, match="erk_power: expected distribution erk with it, got 2"):
        build_config({"distribution": "uniform", "erk_power": 2.0})


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lr: 0.3\nbatch-size: 8\nclip_grad: 1\nnesterov: false\n")
    config = build_config(
        read_config_file(file), parse("-b", "16", "--clip-grad", "none", "--nesterov")
    )
    assert config == TrainConfig(lr=0.3, batch_size=16, clip_grad=None, nesterov=True)


def test_only_the_flags_that_were_given_count() -> None:
    flags = shlex.split("--lr 1 --update-freq 20 --prune-end 75% --no-amp -b 3 --opt adamw")
    expected = TrainConfig(
        lr=1, update_freq=20, prune_end="75%", amp=False, batch_size=3, opt="adamw"
    )
    assert build_config({"amp": True}, parse(*flags)) == expected
    assert parse() == {}


def test_a_flag_that_is_no_number_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="lr: expected a number above 0, got 'fast'"):
        build_config(parse("--lr", "fast"))


def test_args_yaml_comes_back_the_same(tmp_path: Path) -> None:
    config = TrainConfig(
        dataset="cifar10", data_dir="/data/ä", clip_grad=0.5, prune_start="10%", prune_end=300,
        amp=True, weight_decay=1e-4, experiment="null", backend=None, nesterov=False,
    )  # fmt: skip
    write_config_file(tmp_path / "args.yaml", config)
    assert build_config(read_config_file(tmp_path / "args.yaml")) == config
    assert (tmp_path / "args.yaml").read_text().startswith("dataset: cifar10\n")


def test_numbers_that_yaml_reads_as_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("weight_decay: 1e-4\nprune_end: 60%\n")
    config = build_config(read_config_file(tmp_path / "run.yaml"))
    assert config == TrainConfig(weight_decay=0.0001, prune_end="60%")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparsty: 0.9", r"unknown key 'sparsty'; close: sparsity"),
        ("zzz: 1", r"run.yaml: unknown key 'zzz'$"),
        ("- a\n- b", r"expected key: value lines in .*, got \['a', 'b'\]"),
        ("a: [", r"run.yaml is not YAML"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config_file(tmp_path / "run.yaml")


def test_an_empty_file_sets_nothing_and_a_missing_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").touch()
    assert read_config_file(tmp_path / "run.yaml") == {}
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        read_config_file(tmp_path / "none.yaml")


def test_run_directory() -> None:
    assert TrainConfig(seed=3).run_directory == Path("runs/digits-resnet_tiny-granet-3")
    assert TrainConfig(output="a", experiment="b").run_directory == Path("a/b")


def test_what_may_differ_when_a_run_is_resumed() -> None:
    saved = TrainConfig()
    moved = dataclasses.replace(saved, output="elsewhere", device="cpu", workers=4)
    assert resume_conflicts(saved, moved) == []
    changed = dataclasses.replace(saved, lr=0.2, sparsity=0.8)
    assert resume_conflicts(saved, changed) == [
        "lr: 0.1 in the checkpoint, 0.2 now",
        "sparsity: 0.9 in the checkpoint, 0.8 now",
    ]
    dense = TrainConfig(method="dense")
    assert resume_conflicts(dense, dataclasses.replace(dense, sparsity=0.5)) == []


@pytest.mark.parametrize(
    ("fields", "argument"),
    [
        ({"init_sparsity": 0.0}, "initial_sparsity"),
        ({"floor": 0}, "floor"),
        ({"drop_fraction": 0.0}, "drop_fraction"),
        ({"method": "rigl", "update_until": 0}, "update_until"),
        ({"method": "one-shot", "prune_at": 0}, "prune_at"),
    ],
)
def test_a_zero_on_the_command_line_is_a_value(fields: dict[str, object], argument: str) -> None:
    arguments = build._method_arguments(TrainConfig(**fields), 1000)
    assert arguments[argument] == 0
