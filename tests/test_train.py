"""Training: the loop against one written by hand, and runs that stop and go on."""

from __future__ import annotations

import csv
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from granet.training import build
from granet.training.checkpoint import load_checkpoint
from granet.training.config import TrainConfig
from granet.training.stopping import Stopped
from granet.training.telemetry import Summary
from granet.training.train import Trainer, train
from granet_kernels import MaskedLinear, sparsify
from tests.tiny_runs import STEPS_PER_EPOCH, WEIGHTS, make_network, same, tiny, tiny_config

__all__ = ["tiny"]


def entries_of(directory: Path, name: str = "last.pt") -> dict[str, Any]:
    """A checkpoint's content without what differs from run to run."""
    entries = load_checkpoint(directory / name).entries
    for machine_field in ("output", "experiment"):
        del entries["config"][machine_field]
    del entries["progress"]["seconds"]
    return entries


def rows_of(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.pop("seconds")]


def test_learning_rates_by_hand() -> None:
    def factors(total_steps: int, warmup_steps: int, sched: Any) -> list[float]:
        return [
            round(
                build.lr_factor(
                    step, total_steps=total_steps, warmup_steps=warmup_steps, sched=sched
                ),
                4,
            )
            for step in range(total_steps + 1)
        ]

    assert factors(6, 2, "cosine") == [0.3333, 0.6667, 1.0, 0.8536, 0.5, 0.1464, 0.0]
    assert factors(8, 1, "step") == [0.5, 1, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.01]
    assert factors(2, 0, "cosine") == [1.0, 0.5, 0.0]
    assert factors(2, 2, "cosine") == [0.3333, 0.6667, 1.0]


@pytest.mark.parametrize("fields", [{}, {"opt": "adamw", "lr": 1e-3, "sched": "step"}], ids=str)
def test_a_dense_run_is_the_loop_one_would_write(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Two batches of 128 a step, clipped gradients, smoothed labels, with PyTorch's optimizers."""
    config = tiny_config(
        tmp_path, method="dense", batch_size=128, grad_accum_steps=2, clip_grad=0.5,
        smoothing=0.1, seed=4, **fields,
    )  # fmt: skip
    train(config)

    torch.manual_seed(4)
    model = make_network("", num_classes=10, in_channels=1)
    source = build.build_source(config, torch.device("cpu"))
    optimizer: torch.optim.Optimizer
    if config.opt == "sgd":
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=5e-4)
    step = 0
    for epoch in range(3):
        batches = list(source.train_batches(epoch))[:10]
        model.train()
        for first in range(0, 10, 2):
            factor = build.lr_factor(step, total_steps=15, warmup_steps=2, sched=config.sched)
            optimizer.param_groups[0]["lr"] = config.lr * factor
            for images, labels in batches[first : first + 2]:
                loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
                (loss / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    state = entries_of(tmp_path / "run")["model"]
    assert same(dict(state), dict(model.state_dict()))


def test_a_sparse_run_reaches_its_target_and_records_it(tmp_path: Path) -> None:
    summary = train(tiny_config(tmp_path))
    rows = rows_of(tmp_path / "run")
    active = WEIGHTS - round(WEIGHTS * 0.9)
    assert [int(row["step"]) for row in rows] == [5, 10, 15]
    assert [int(row["active_weights"]) for row in rows][1:] == [active, active]
    assert int(rows[0]["active_weights"]) > active
    assert float(rows[-1]["sparsity"]) == 1 - active / WEIGHTS
    assert summary.active_weights == active
    assert summary.total_weights == WEIGHTS
    assert yaml.safe_load((tmp_path / "run" / "summary.yaml").read_text())["steps"] == 15
    state = entries_of(tmp_path / "run", summary.checkpoint)["model"]
    assert summary.epoch == 3  # not 2, which ends with an update
    zeros = sum(int((state[f"{name}.weight"] == 0).sum()) for name in (0, 5, 6))
    assert zeros == WEIGHTS - active
    assert any(name.name.startswith("events.out") for name in (tmp_path / "run").iterdir())


def test_training_flops_are_those_of_the_masks_in_force(tmp_path: Path) -> None:
    """The convolution uses each of its 72 weights 16 times, the linear layers theirs once."""
    trainer = Trainer(tiny_config(tmp_path))
    assert trainer.sparsifier is not None
    uses = {"0": 16, "5": 1, "6": 1}
    used: list[int] = []
    change_masks = trainer.sparsifier.step

    def step() -> bool:
        used.append(
            sum(uses[name] * layer.count_active() for name, layer in trainer.masked.items())
        )
        return change_masks()

    trainer.sparsifier.step = step  # type: ignore[method-assign]
    summary = trainer.run()
    dense = 16 * 72 + 1408 + 110
    assert used[0] > used[3] > used[-1]
    assert summary.train_flops_ratio == pytest.approx(sum(used) / (15 * dense), rel=1e-12)
    assert summary.inference_flops_ratio == pytest.approx(used[-1] / dense, rel=0.2)


def test_a_dense_run_costs_what_dense_training_costs(tmp_path: Path) -> None:
    summary = train(tiny_config(tmp_path, method="dense", epochs=1))
    assert (summary.train_flops_ratio, summary.inference_flops_ratio) == (1, 1)
    assert (summary.active_weights, summary.sparsity) == (WEIGHTS, 0)


VARIANTS: dict[str, dict[str, Any]] = {
    "granet": {},
    "dense": {"method": "dense"},
    "adamw": {"opt": "adamw", "lr": 1e-3, "sched": "step", "init_sparsity": 0.0},
    "accumulation": {"batch_size": 100, "grad_accum_steps": 2, "clip_grad": 1.0},
    "float16": {"amp": True, "channels_last": True, "smoothing": 0.1},
    "mixup and average": {"mixup": 0.4, "model_ema": True, "model_ema_decay": 0.7},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_stopping_at_every_step_changes_nothing(tmp_path: Path, name: str) -> None:
    """A run in one go, and one that stops after every single step."""
    whole = tiny_config(tmp_path, experiment="whole", **VARIANTS[name])
    expected = train(whole)
    pieces = tiny_config(tmp_path, experiment="pieces", **VARIANTS[name])
    summary = run_in_pieces(pieces, stop_after=1)
    for checkpoint in ("last.pt", "best.pt"):
        left = entries_of(tmp_path / "whole", checkpoint)
        right = entries_of(tmp_path / "pieces", checkpoint)
        differing = [key for key in left if not same(left[key], right[key])]
        assert differing == []
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "pieces")
    assert (summary.test_acc, summary.epoch) == (expected.test_acc, expected.epoch)


def run_in_pieces(config: TrainConfig, stop_after: int) -> Summary:
    last = config.run_directory / "last.pt"
    for _ in range(100):
        resume = load_checkpoint(last) if last.exists() else None
        try:
            return train(config, resume=resume, stop_after=stop_after)
        except Stopped:
            torch.rand(7)  # another process would start with another state
    raise AssertionError("the run does not get on")


def test_a_run_goes_on_from_an_older_checkpoint_without_double_rows(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    directory = config.run_directory
    with pytest.raises(Stopped):
        train(config, stop_after=STEPS_PER_EPOCH + 2)
    shutil.copy(directory / "last.pt", tmp_path / "older.pt")
    train(config, resume=load_checkpoint(directory / "last.pt"))
    rows, final = rows_of(directory), entries_of(directory)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    with (directory / "metrics.csv").open("a") as file:
        file.write("4,20,0.1")  # as if killed while writing
    shutil.copy(tmp_path / "older.pt", directory / "last.pt")
    train(config, resume=load_checkpoint(directory / "last.pt"))
    assert rows_of(directory) == rows
    assert same(entries_of(directory), final)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_leaves_a_checkpoint(tmp_path: Path, number: int) -> None:
    trainer = Trainer(tiny_config(tmp_path))
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    kill_in_batch(trainer, "train_batches", 2, number)
    with pytest.raises(Stopped) as stop:
        trainer.run()
    assert stop.value.signal_number == number
    assert "stopped at step 3; continue with --resume" in str(stop.value)
    progress = entries_of(tmp_path / "run")["progress"]
    assert (progress["step"], progress["batch"]) == (3, 3)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


def test_a_signal_during_validation_does_not_lose_the_epoch(tmp_path: Path) -> None:
    expected = train(tiny_config(tmp_path, experiment="whole"))
    config = tiny_config(tmp_path)
    trainer = Trainer(config)
    kill_in_batch(trainer, "val_batches", 0, signal.SIGTERM)
    with pytest.raises(Stopped):
        trainer.run()
    progress = entries_of(tmp_path / "run")["progress"]
    assert (progress["epoch"], progress["batch"]) == (0, STEPS_PER_EPOCH)
    resumed = train(config, resume=load_checkpoint(config.run_directory / "last.pt"))
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")
    assert resumed.test_loss == expected.test_loss


def test_a_signal_during_the_test_keeps_the_last_weights(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(tmp_path))
    kill_in_batch(trainer, "test_batches", 0, signal.SIGTERM)
    force_validation(trainer, [50.0, 40.0, 30.0])
    with pytest.raises(Stopped):
        trainer.run()
    assert entries_of(tmp_path / "run")["progress"]["epoch"] == 3


def test_a_second_ctrl_c_interrupts_at_once(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(tmp_path))
    kill_in_batch(trainer, "train_batches", 2, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()


def kill_in_batch(trainer: Trainer, name: str, index: int, *numbers: int) -> None:
    """Send signals to this process while batch `index` is being made, once."""
    original = getattr(trainer.source, name)
    pending = list(numbers)

    def batches(*args: Any, **kwargs: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for count, batch in enumerate(original(*args, **kwargs)):
            while count == index and pending:
                os.kill(os.getpid(), pending.pop(0))
            yield batch

    setattr(trainer.source, name, batches)


def force_validation(trainer: Trainer, accuracies: list[float]) -> None:
    """Let the epochs' validation accuracies be these; the test's stay what they are."""
    original, left = trainer.evaluate, list(accuracies)

    def evaluate(batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        loss, accuracy = original(batches)
        return loss, left.pop(0) if left else accuracy

    trainer.evaluate = evaluate  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("accuracies", "update_freq", "best"),
    [([90.0, 50.0, 40.0], 4, 2), ([10.0, 50.0, 50.0], 4, 3), ([90.0, 90.0, 10.0], 5, 3)],
    ids=["the first prunes on", "the later of equals", "the second has just regrown"],
)
def test_the_best_epoch_ends_as_a_final_network(
    tmp_path: Path, accuracies: list[float], update_freq: int, best: int
) -> None:
    """Pruning ends at step 8 of 15, in the second epoch, or at step 5."""
    trainer = Trainer(tiny_config(tmp_path, update_freq=update_freq))
    force_validation(trainer, accuracies)
    summary = trainer.run()
    assert (summary.checkpoint, summary.epoch) == ("best.pt", best)


def test_the_best_epoch_owes_nothing_to_the_test_images(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(tmp_path))
    read: list[int] = []
    original = trainer.source.test_batches

    def test_batches() -> Iterator[tuple[Tensor, Tensor]]:
        read.append(trainer.progress.epoch)
        return original()

    trainer.source.test_batches = test_batches  # type: ignore[method-assign]
    trainer.run()
    assert read == [3]


def test_a_run_that_never_prunes_to_the_end_tests_its_last_epoch(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(tmp_path))
    trainer.is_final_network = lambda: False  # type: ignore[method-assign]
    summary = trainer.run()
    assert (summary.checkpoint, summary.epoch) == ("last.pt", 3)
    assert not (tmp_path / "run" / "best.pt").exists()


def test_a_directory_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    Trainer(tiny_config(tmp_path))
    before = (tmp_path / "run" / "last.pt").read_bytes()
    with pytest.raises(ValueError, match=r"already holds a run .*continue it with --resume"):
        Trainer(tiny_config(tmp_path, seed=1))
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"device": "tpu"}, "device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        ({"device": "meta"}, "device: expected auto, cpu, cuda or cuda:N, got 'meta'"),
        ({"device": "cuda:99"}, "device: expected (one of the .* CUDA devices present|cpu where)"),
        ({"grad_accum_steps": 6}, "grad_accum_steps: expected at most the 5 batches of an epoch"),
        ({"batch_size": 5000}, "batch_size"),
        ({"prune_end": "half"}, "prune_end: expected a step or a percentage"),
        ({"update_freq": 10}, "holds no update"),
        ({"sparsity": 0.9999}, "sparsity"),
        ({"backend": "tpu"}, "tpu"),
    ],
    ids=str,
)
def test_an_impossible_run_leaves_no_directory(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny_config(tmp_path, **fields))
    assert not (tmp_path / "run").exists()


def test_stop_after_needs_a_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop_after: expected at least 1 step, got 0"):
        train(tiny_config(tmp_path), stop_after=0)


def test_clipping_looks_at_active_weights_only() -> None:
    model = sparsify(nn.Sequential(nn.Linear(2, 1, bias=False)))
    layer = model[0]
    assert isinstance(layer, MaskedLinear)
    layer.mask = torch.tensor([[True, False]])
    layer.weight.grad = torch.tensor([[3.0, 400.0]])
    build.clip_gradients(model, 1.5)
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[1.5, 200.0]]))


def test_a_step_with_an_infinite_gradient_does_not_count() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    outcomes = []
    for factor in (1.0, float("inf"), 1.0):
        scaler.scale(weight * factor).sum().backward()
        outcomes.append(build.step_optimizer(scaler, optimizer))
        optimizer.zero_grad()
    assert outcomes == [True, False, True]
