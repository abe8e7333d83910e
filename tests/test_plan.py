"""`granet plan`: what it says of a run is what the run is."""

from __future__ import annotations

from pathlib import Path

import pytest

from granet.cli import main
from granet.commands import plan as planning
from granet.commands.plan import FACTS, make_plan
from granet.training.config import TrainConfig
from granet.training.train import Trainer
from tests.tiny_runs import WEIGHTS, tiny, tiny_config  # noqa: F401


@pytest.mark.parametrize("method", ["granet", "gmp", "rigl", "snip", "lottery-ticket"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_plan_is_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, scope: str
) -> None:
    monkeypatch.setattr("granet.models.create_model", planning_network)
    settings = {"rounds": 2} if method == "lottery-ticket" else {}
    if scope == "layer" and method in ("granet", "gmp"):
        settings["scope"] = "layer"  # type: ignore[assignment]
    config = tiny_config(tmp_path, method=method, **settings)
    plan = make_plan(config)
    trainer = Trainer(config)
    sparsifier = trainer.sparsifier
    assert sparsifier is not None
    assert plan.total_steps == trainer.total_steps
    assert [x.layer for x in plan.layers] == list(sparsifier.layers)
    if method != "snip":  # which prunes when it has seen a batch
        assert [x.active_at_start for x in plan.layers] == sparsifier.active_counts()
    steps, sparsities = [], []
    change_masks = sparsifier.step

    def step() -> bool:
        updated = change_masks()
        if updated:
            steps.append(sparsifier.steps)
            sparsities.append(sparsifier.sparsity)
        return updated

    sparsifier.step = step  # type: ignore[method-assign]
    trainer.run()
    assert (list(plan.updates), list(plan.sparsities)) == (steps, sparsities)
    assert sum(sparsifier.active_counts()) == plan.target_active == 159
    for layer, active in zip(plan.layers, sparsifier.active_counts(), strict=True):
        assert layer.active_at_end in (None, active)
    assert (plan.layers[0].active_at_end is not None) == (method == "rigl" or "scope" in settings)
    assert sum(x.weights for x in plan.layers) == WEIGHTS
    assert plan.optimizer_bytes == 4 * sum(p.numel() for p in trainer.model.parameters())


def planning_network(name: str, *, num_classes: int, in_channels: int):  # type: ignore[no-untyped-def]
    from tests.tiny_runs import make_network

    return make_network(name, num_classes=num_classes, in_channels=in_channels)


def test_the_facts_are_those_of_the_data() -> None:
    from granet.training.build import build_source, choose_device

    source = build_source(TrainConfig(val_split=0.01, batch_size=1), choose_device("cpu"))
    images, classes, shape = FACTS["digits"]
    assert (source.num_classes, source.sample_shape) == (classes, shape)
    assert abs(source.steps_per_epoch - images * 0.99) < 3


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    line = "plan -c cifar10-vgg19 -c rigl sparsity=0.98 model=resnet20 --update-freq 20%"
    assert main(line.split()) == 0
    printed = capsys.readouterr().out
    assert (
        "rigl: 268,336 weights, 5,367 active at the start, 5,367 at the end (98.00% sparse)"
        in printed
    )
    assert "3 updates, from step 11,232 to 33,696" in printed
    assert "blocks.0.conv1" in printed
    assert (
        main(
            [
                "plan",
                "sparsity=0.995",
                "init_sparsity=0.99",
                "distribution=uniform",
                "update_freq=20%",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "WARNING: fewer active weights than output channels at the start" in printed
    assert "WARNING: only 4 updates; pruning is gradual with some dozens" in printed


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("plan sparsity=0.99999", "largest feasible sparsity"),
        ("plan update_freq=60%", "prune_end: the ramp from step 0 to"),
        ("plan method=dense", "method: expected a sparse one, got 'dense'"),
    ],
)
def test_what_cannot_be_is_said(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(line.split())
    assert message in capsys.readouterr().err
    assert planning.FACTS


def test_what_redistribution_moves_is_not_foretold(tmp_path: Path) -> None:
    plan = make_plan(tiny_config(tmp_path, method="rigl", redistribution="magnitude"))
    assert {layer.active_at_end for layer in plan.layers} == {None}
