"""Mixup, averaged weights and evaluation alone: each against what one would write by hand."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torchvision.transforms import v2

from granet import cli
from granet.training import build
from granet.training.average import AverageInSteps
from granet.training.checkpoint import CheckpointError, load_checkpoint
from granet.training.evaluate import evaluate
from granet.training.runs import read_run
from granet.training.train import Trainer, train
from granet_kernels import masked_layers
from tests.tiny_runs import make_network, same, tiny, tiny_config

__all__ = ["tiny"]

AVERAGED: dict[str, Any] = {"model_ema": True, "model_ema_decay": 0.7}


def by_hand(config: Any, mix: Any = None) -> Iterator[tuple[nn.Module, int, int]]:
    """A dense run with PyTorch's parts alone: the model after each step, and the step of the epoch."""
    torch.manual_seed(config.seed)
    model = make_network("", num_classes=10, in_channels=1)
    source = build.build_source(config, torch.device("cpu"))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.lr, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    steps = config.epochs * source.steps_per_epoch
    for epoch in range(config.epochs):
        for index, (images, labels) in enumerate(source.train_batches(epoch)):
            factor = build.lr_factor(
                epoch * source.steps_per_epoch + index,
                total_steps=steps, warmup_steps=2, sched=config.sched,
            )  # fmt: skip
            optimizer.param_groups[0]["lr"] = config.lr * factor
            model.train()
            inputs, targets = (images, labels) if mix is None else mix(images, labels)
            F.cross_entropy(model(inputs), targets, label_smoothing=0.1).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield model, epoch, index


def test_mixup_is_torchvision_s(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, method="dense", mixup=0.3, smoothing=0.1, seed=2)
    train(config)
    *_, (model, _, _) = by_hand(config, v2.MixUp(alpha=0.3, num_classes=10))
    assert same(load_checkpoint(tmp_path / "run" / "last.pt").network, dict(model.state_dict()))


def test_the_average_is_the_usual_one(tmp_path: Path) -> None:
    """The first step's weights, then 2/11, 3/12 and so on of what there is, and at last 0.7."""
    config = tiny_config(tmp_path, method="dense", smoothing=0.1, **AVERAGED)
    train(config)
    average: dict[str, Tensor] = {}
    for step, (model, _, _) in enumerate(by_hand(config)):
        decay = min(0.7, (1 + step) / (10 + step))
        for name, value in model.named_parameters():
            before = average.get(name, value.detach())
            average[name] = torch.lerp(before, value.detach(), 1 - decay)
    averaged = copy.deepcopy(model)
    averaged.load_state_dict(average, strict=False)
    source = build.build_source(config, torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):
        update_bn(source.train_batches(2), averaged)  # statistics of its own, of the last epoch
    checkpoint = load_checkpoint(tmp_path / "run" / "last.pt")
    for name, value in checkpoint.network.items():
        torch.testing.assert_close(value, averaged.state_dict()[name], rtol=1e-5, atol=1e-6)
    assert not same(checkpoint.network, checkpoint.entries["model"])


def test_the_average_has_the_masks_and_is_what_is_tested(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(tmp_path, **AVERAGED))
    summary = trainer.run()
    result = read_run(tmp_path / "run")
    assert result.counted.inactive == result.counted.zero
    assert result.counted.active == summary.active_weights
    best = load_checkpoint(tmp_path / "run" / "best.pt")
    average, trained = best.network, best.entries["model"]
    for name in masked_layers(trainer.model):
        assert torch.equal(average[f"{name}.packed_mask"], trained[f"{name}.packed_mask"])
        assert not torch.equal(average[f"{name}.weight"], trained[f"{name}.weight"])
    results = evaluate(trainer.config, best)
    assert results == {
        "val": (pytest.approx(results["val"][0]), summary.val_acc),
        "test": (summary.test_loss, summary.test_acc),
    }


def test_at_every_step_inactive_weights_of_the_average_are_zero(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(tmp_path, **AVERAGED))
    assert trainer.average is not None
    seen = []

    def see(step: int) -> None:
        assert trainer.average is not None
        for name, layer in masked_layers(trainer.average.module).items():
            assert torch.equal(layer.mask, masked_layers(trainer.model)[name].mask)
            assert not layer.weight[~layer.mask].any()
        seen.append(step)

    trainer.record.begin()
    trainer.record.step = see  # type: ignore[method-assign]
    for _ in range(3):
        trainer.train_epoch()
        trainer.finish_epoch()
    assert seen == list(range(1, 16))


def test_who_moves_the_average(tmp_path: Path) -> None:
    """MaskedSGD in its step; with any other optimizer a pass of its own. A checkpoint is the same."""
    in_steps, apart = (
        Trainer(tiny_config(tmp_path / opt, opt=opt, **AVERAGED)).average
        for opt in ("sgd", "adamw")
    )
    assert isinstance(in_steps, AverageInSteps)
    assert type(apart) is AveragedModel
    assert in_steps.state_dict().keys() == apart.state_dict().keys()


def test_an_average_does_not_follow_a_rewind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model_ema: expected a method that does not rewind"):
        Trainer(tiny_config(tmp_path, method="lottery-ticket", rounds=2, **AVERAGED))


def test_a_skipped_step_leaves_the_average_alone(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(tmp_path, **AVERAGED))
    assert trainer.average is not None
    trainer.passes.step = lambda *_: False  # type: ignore[method-assign, assignment]
    trainer.after_step = lambda: None  # type: ignore[method-assign]
    trainer.train_epoch()
    assert int(trainer.average.n_averaged) == 0
    assert trainer.progress.step == 0


def snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_evaluation_alone_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = train(tiny_config(tmp_path))
    before = snapshot(tmp_path / "run")
    capsys.readouterr()
    assert cli.main(["train", "--resume", str(tmp_path / "run"), "--eval-only", "-b", "7"]) == 0
    output = capsys.readouterr().out
    assert f"{summary.checkpoint}, epoch {summary.epoch}" in output
    assert f"test  loss {summary.test_loss:.4f}  accuracy {summary.test_acc:.2f} %" in output
    assert snapshot(tmp_path / "run") == before
    last = tmp_path / "run" / "last.pt"
    assert cli.main(["train", "--resume", str(last), "--eval-only"]) == 0
    assert f"{last}, epoch 3" in capsys.readouterr().out


def test_evaluation_wants_a_checkpoint_that_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--eval-only"])
    assert "eval-only: expected a checkpoint or run directory" in capsys.readouterr().err
    train(tiny_config(tmp_path))
    checkpoint = load_checkpoint(tmp_path / "run" / "last.pt")
    monkeypatch.setattr(build, "create_model", lambda *_, **__: nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="expected a checkpoint of this architecture"):
        evaluate(checkpoint.config, checkpoint)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mixup", "-1"], "mixup: expected"),
        (["--model-ema-decay", "1"], "model-ema-decay|model_ema_decay: expected"),
    ],
)
def test_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", *flags])
    assert re.search(message, capsys.readouterr().err)
