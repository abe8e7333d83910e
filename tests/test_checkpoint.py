"""Checkpoints: whole or absent on disk, refused as a whole when they do not fit."""

from __future__ import annotations

import copy
import dataclasses
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from granet.training.checkpoint import (
    CheckpointError,
    check_model_state,
    get_rng_state,
    load_checkpoint,
    save_checkpoint,
    set_rng_state,
)
from granet.training.train import Trainer, train
from tests.tiny_runs import same, tiny, tiny_config

__all__ = ["tiny"]

Entries = dict[str, Any]


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(tiny_config(tmp_path))


def test_entries_come_back_and_are_plain(trainer: Trainer, tmp_path: Path) -> None:
    entries = trainer.entries()
    path = tmp_path / "saved.pt"
    save_checkpoint(path, entries)
    assert same(load_checkpoint(path).entries | entries, load_checkpoint(path).entries)
    content = torch.load(path, weights_only=True)
    assert (content["format"], content["version"]) == ("granet-checkpoint", 2)
    assert load_checkpoint(path).config == trainer.config
    umask_default = tmp_path / "touched"
    umask_default.touch()
    assert stat.filemode(path.stat().st_mode) == stat.filemode(umask_default.stat().st_mode)


def test_a_write_replaces_the_file_and_never_changes_it(trainer: Trainer, tmp_path: Path) -> None:
    path = trainer.directory / "last.pt"
    os.link(path, tmp_path / "old.pt")
    before = path.read_bytes()
    trainer.progress.step = 7
    trainer.save("last.pt")
    assert (tmp_path / "old.pt").read_bytes() == before
    assert load_checkpoint(path).entries["progress"]["step"] == 7


def test_a_failed_write_leaves_the_old_file_and_no_litter(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trainer.directory / "last.pt"
    before, names = path.read_bytes(), set(trainer.directory.iterdir())

    def disk_full(content: object, file: Any) -> None:
        file.write(b"half a checkpoint")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="no space"):
        trainer.save("last.pt")
    assert path.read_bytes() == before
    assert set(trainer.directory.iterdir()) == names


def damage_end(content: bytes) -> bytes:
    return content[: len(content) // 2]


def damage_bit(content: bytes) -> bytes:
    """Inside the tensor data, where torch.load notices nothing."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_end, "expected a whole checkpoint, got a truncated or corrupt file"),
        (damage_bit, r"expected a whole checkpoint, got a (truncated or )?corrupt"),
        (lambda content: b"", "expected a whole checkpoint"),
        (lambda content: b"text", "expected a whole checkpoint"),
    ],
    ids=["truncated", "flipped bit", "empty", "text"],
)
def test_a_damaged_file_is_refused(
    trainer: Trainer, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = trainer.directory / "last.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.zeros(2)}, "expected a granet checkpoint, got another kind of file"),
        ({"format": "granet-checkpoint", "version": 9}, "expected checkpoint version 2, got 9"),
        ({"format": "granet-checkpoint", "version": 2}, "expected entries .*'model'"),
        (nn.Linear(2, 2), "expected a granet checkpoint, got: "),
    ],
    ids=["state_dict", "version", "entries", "pickled module"],
)
def test_another_file_is_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "other.pt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"found none at .*last\.pt"):
        load_checkpoint(tmp_path / "last.pt")


def test_a_configuration_of_another_version_is_refused(trainer: Trainer, tmp_path: Path) -> None:
    entries = trainer.entries()
    entries["config"] = entries["config"] | {"learning_rate": 0.1}
    save_checkpoint(tmp_path / "x.pt", entries)
    with pytest.raises(CheckpointError, match="unknown key 'learning_rate'"):
        load_checkpoint(tmp_path / "x.pt")


def test_another_architecture_is_listed_compactly(tmp_path: Path) -> None:
    state = nn.Sequential(nn.Linear(3, 4), *(nn.BatchNorm1d(4) for _ in range(3))).state_dict()
    with pytest.raises(CheckpointError) as error:
        check_model_state(tmp_path, nn.Sequential(nn.Linear(2, 4)), state)
    assert str(error.value) == (
        f"{tmp_path}: expected a checkpoint of this architecture; "
        "unexpected: 1.weight, 1.bias, 1.running_mean, 1.running_var and 11 more; "
        "mismatched: 0.weight (expected float32 (4, 2), got float32 (4, 3))"
    )
    del state["0.bias"]
    with pytest.raises(CheckpointError, match=r"missing: 0\.bias; unexpected: 1\.weight, "):
        check_model_state(tmp_path, nn.Sequential(nn.Linear(3, 4)), state)


def edit_config(entries: Entries) -> None:
    entries["config"] |= {"lr": 0.2, "prune_end": 6, "workers": 2}


def edit_method(entries: Entries) -> None:
    entries["config"] |= {"method": "dense"}
    entries["sparsifier"] = None


def edit_mask_shape(entries: Entries) -> None:
    entries["model"]["5.packed_mask"] = torch.zeros(32, dtype=torch.uint8)


def edit_mask_tail(entries: Entries) -> None:
    entries["model"]["0.packed_mask"][-1] = 255


def edit_weight(entries: Entries) -> None:
    entries["model"]["5.weight"] = entries["model"]["5.weight"].double()


def edit_groups(entries: Entries) -> None:
    entries["optimizer"]["param_groups"][0]["params"].pop()


def edit_momentum(entries: Entries) -> None:
    entries["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(3)


def edit_sparsifier(entries: Entries) -> None:
    entries["sparsifier"]["masks"]["5"] = torch.zeros(16, dtype=torch.uint8)


def edit_flops(entries: Entries) -> None:
    entries["flops"]["dense"] = {"0": 1}


def edit_length(entries: Entries) -> None:
    entries["progress"]["total_steps"] = 20


def remove_sparsifier(entries: Entries) -> None:
    entries["sparsifier"] = None


REFUSALS: dict[Callable[[Entries], None], str] = {
    edit_config: "these settings differ: lr: 0.2 in the checkpoint, 0.1 now, "
    "prune_end: 6 in the checkpoint, 8 now",
    edit_method: "these settings differ: method: 'dense' in the checkpoint, 'granet' now",
    edit_mask_shape: "5.packed_mask (expected uint8 (176,), got uint8 (32,))",
    edit_mask_tail: "0.packed_mask: expected zero bits behind the last of 72 weights",
    edit_weight: "5.weight (expected float32 (11, 128), got float64 (11, 128))",
    edit_groups: "expected an optimizer with parameter groups of [5], got [4]",
    edit_momentum: "expected momentum_buffer of shape (8, 1, 3, 3), got (3,)",
    edit_sparsifier: "entry 'sparsifier' does not fit: state: masks['5']",
    edit_flops: "entry 'flops' does not fit",
    edit_length: "expected a run of 15 steps, got one of 20",
    remove_sparsifier: "expected one as sparsifier, found none",
}


@pytest.mark.parametrize("edit", REFUSALS, ids=lambda edit: edit.__name__)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    edit: Callable[[Entries], None], tmp_path: Path
) -> None:
    config = tiny_config(tmp_path)
    other = Trainer(dataclasses.replace(config, experiment="other"))
    other.run()
    entries = copy.deepcopy(other.entries())
    edit(entries)
    path = tmp_path / "edited.pt"
    save_checkpoint(path, entries)

    trainer = Trainer(config)
    before, rng = copy.deepcopy(trainer.entries()), torch.get_rng_state()
    with pytest.raises(CheckpointError) as error:
        trainer.restore(load_checkpoint(path))
    assert str(error.value).startswith(f"{path}: ")
    assert REFUSALS[edit] in str(error.value)
    after = trainer.entries()
    before["progress"]["seconds"] = after["progress"]["seconds"] = 0
    assert same(before, after)
    assert same(rng, torch.get_rng_state())


def test_restoring_gives_back_every_entry(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    train(config)
    checkpoint = load_checkpoint(tmp_path / "run" / "last.pt")
    restored = Trainer(config, resume=checkpoint).entries()
    restored["progress"]["seconds"] = checkpoint.entries["progress"]["seconds"]
    assert same(checkpoint.entries | restored, checkpoint.entries)


def test_random_state_is_taken_and_given_back() -> None:
    state = get_rng_state()
    first = torch.rand(3)
    torch.rand(5)
    set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda entries: entries.update(progress={}), "None as progress epoch"),
        (lambda entries: entries["progress"].update(epoch=-1), "-1 as progress epoch"),
        (lambda entries: entries["progress"].pop("running"), "progress that lacks its sums"),
        (lambda entries: entries.update(optimizer={}), "an optimizer without state"),
        (lambda entries: entries.update(model=None), "NoneType as model"),
        (lambda entries: entries.update(other_rngs=None), "NoneType as other_rngs"),
        (
            lambda entries: entries["rng"].update(cpu=torch.zeros(3)),
            "a random state of another kind",
        ),
        (lambda entries: entries.update(flops={}), "flops that lack their totals"),
    ],
)
def test_broken_contents_are_named(
    trainer: Trainer, damage: Callable[[Entries], object], message: str
) -> None:
    entries = copy.deepcopy(trainer.entries())
    damage(entries)
    path = trainer.directory / "last.pt"
    save_checkpoint(path, entries)
    with pytest.raises(
        CheckpointError, match=f"expected a granet checkpoint, got one with {message}"
    ):
        load_checkpoint(path)


def test_a_run_goes_on_in_as_many_processes_and_within_its_epoch(trainer: Trainer) -> None:
    entries = copy.deepcopy(trainer.entries())
    path = trainer.directory / "last.pt"
    save_checkpoint(path, entries | {"other_rngs": [get_rng_state()]})
    with pytest.raises(CheckpointError, match="expected a run of 1 processes, got one of 2"):
        Trainer(trainer.config, resume=load_checkpoint(path))
    entries["progress"]["batch"] = 9999
    save_checkpoint(path, entries)
    with pytest.raises(CheckpointError, match="expected an epoch of 5 batches, got batch 9999"):
        Trainer(trainer.config, resume=load_checkpoint(path))


def test_the_best_epoch_has_to_be_there_still(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    train(config)
    (config.run_directory / "best.pt").unlink()
    with pytest.raises(CheckpointError, match=r"found no best\.pt"):
        Trainer(config, resume=load_checkpoint(config.run_directory / "last.pt"))
