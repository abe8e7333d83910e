"""Every method: it trains digits to its target exactly, and does what its page says."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from granet import METHODS
from granet.cli import main
from granet.criteria import DROP, GROWTH
from granet.distributions import DISTRIBUTIONS, layer_budgets
from granet.engine import Sparsifier
from granet.methods import (
    GMP,
    SET,
    SNIP,
    GraNet,
    GraSP,
    LotteryTicket,
    OneShot,
    RigL,
    StaticRandom,
    SynFlow,
)
from granet.redistribution import REDISTRIBUTION, shares
from granet.schedules import CURVES, DROP_SCHEDULES, Constant
from granet.training.train import train
from granet_kernels import MaskedSGD, densify, masked_layers, sparsify
from tests.tiny_runs import WEIGHTS, tiny, tiny_config  # noqa: F401

EXTRA: dict[str, dict[str, Any]] = {
    "lottery-ticket": {"rounds": 3, "rewind_to": 1},
    "synflow": {"rounds": 10},
    "one-shot": {"prune_at": 6},
}
CHOICES: dict[str, dict[str, Any]] = {
    **{f"ramp {name}": {"ramp": name} for name in CURVES},
    **{f"drop {name}": {"drop": name} for name in DROP},
    **{f"grow {name}": {"grow": name} for name in GROWTH},
    **{f"redistribution {name}": {"redistribution": name} for name in REDISTRIBUTION},
    **{f"regrown {name}": {"regrown": name} for name in ("keep", "zero", "layer_mean")},
    **{f"distribution {name}": {"distribution": name} for name in DISTRIBUTIONS},
    **{f"drop schedule {name}": {"drop_schedule": name} for name in DROP_SCHEDULES},
    "erk power": {"erk_power": 0.5},
    "explicit": {"distribution": "0.5,0.9322,0.75"},
    "layer scope": {"scope": "layer"},
    "adamw": {"opt": "adamw", "lr": 1e-3, "redistribution": "momentum", "regrown": "layer_mean"},
    "momentum": {"redistribution": "momentum", "grow": "momentum", "drop": "sign"},
}
TARGET = WEIGHTS - round(WEIGHTS * 0.9)


@pytest.mark.parametrize("name", METHODS)
def test_digits_end_at_exactly_the_target(tmp_path: Path, name: str) -> None:
    config = tiny_config(tmp_path, method=name, **EXTRA.get(name, {}))
    assert train(config).active_weights == TARGET
    state = torch.load(config.run_directory / "last.pt", weights_only=True)["model"]
    zeros = [state[f"{layer}.weight"] == 0 for layer in (0, 5, 6)]
    active = [~zero for zero in zeros]
    # What SET grew in its last update at a unit that is never active has had no gradient.
    assert TARGET - sum(map(int, map(torch.sum, active))) in (range(20) if name == "set" else (0,))


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_ends_at_exactly_the_target(tmp_path: Path, name: str) -> None:
    assert train(tiny_config(tmp_path, **CHOICES[name])).active_weights == TARGET


# --- a network by hand ----------------------------------------------------------------------------

STEPS = 24
Parts = tuple[nn.Module, torch.optim.Optimizer, Sparsifier]


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 4)
    )
    return sparsify(model)


def parts(method: type[Sparsifier], **settings: Any) -> Any:
    model = network()
    optimizer = MaskedSGD(model.parameters(), lr=0.1, momentum=0.9)
    settings = {"sparsity": 0.8, "total_steps": STEPS} | settings
    return model, optimizer, method(model, optimizer, **settings)  # type: ignore[arg-type]


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 12, generator=generator), torch.randint(4, (8,), generator=generator)


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: Sparsifier, at: int
) -> bool:
    inputs, targets = batch(at)
    nn.functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    changed = sparsifier.step()
    optimizer.zero_grad()
    return changed


def masks(sparsifier: Sparsifier) -> list[Tensor]:
    return [layer.mask for layer in sparsifier.layers.values()]


def each_step(made: Any) -> list[list[Tensor]]:
    """Masks before the first step, and after each."""
    seen = [masks(made[2])]
    for at in range(STEPS):
        step(*made, at)
        seen.append(masks(made[2]))
    return seen


def test_gradual_magnitude_pruning_activates_nothing() -> None:
    seen = each_step(parts(GMP, update_every=2))
    counts = [sum(int(mask.sum()) for mask in all_masks) for all_masks in seen]
    assert counts[0] == 624
    assert counts[-1] == 624 - round(624 * 0.8)
    assert len(set(counts)) == 7  # six prunes
    for before, after in itertools.pairwise(seen):
        assert not any((new & ~old).any() for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("method", [StaticRandom, OneShot, SNIP, GraSP, SynFlow])
def test_masks_that_do_not_change_after_their_prune(method: type[Sparsifier]) -> None:
    made = parts(method, **({"prune_at": 3} if method is OneShot else {}))
    if hasattr(made[2], "start"):
        made[2].start([batch(0)])
    seen = each_step(made)
    same = [all(map(torch.equal, old, new)) for old, new in itertools.pairwise(seen)]
    assert same == [not (method is OneShot and at == 3) for at in range(1, STEPS + 1)]


def test_static_masks_have_the_budgets_of_their_distribution() -> None:
    _, _, sparsifier = parts(StaticRandom, distribution="uniform")
    assert sparsifier.active_counts() == layer_budgets(sparsifier.shapes, 0.8, "uniform")


def test_one_shot_at_the_start_prunes_what_the_model_came_with() -> None:
    expected = network()
    magnitudes = torch.cat([m.weight.flatten() for m in masked_layers(expected).values()]).abs()
    _, _, sparsifier = parts(OneShot, prune_at=0)
    threshold = magnitudes.sort(descending=True).values[sparsifier.target_active - 1]
    kept = torch.cat([mask.flatten() for mask in masks(sparsifier)])
    assert torch.equal(kept, magnitudes >= threshold)


def test_rigl_moves_connections_to_the_largest_gradients_and_stops() -> None:
    made = parts(RigL, update_every=4, drop_fraction=Constant(value=0.5), update_until=12)
    model, optimizer, sparsifier = made
    changes = []
    for at in range(STEPS):
        inputs, targets = batch(at)
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        layer = sparsifier.layers["2"]
        gradient, weight, before = layer.weight.grad.clone(), layer.weight.clone(), layer.mask
        if sparsifier.step():
            changes.append(at + 1)
            count = math.ceil(0.5 * int(before.sum()))
            order = weight.abs().masked_fill(~before, -1).flatten().argsort(descending=True)
            kept = torch.zeros(before.numel(), dtype=torch.bool)
            kept[order[: int(before.sum()) - count]] = True
            gain = gradient.abs().flatten().masked_fill(kept, -1)
            kept[gain.argsort(descending=True)[:count]] = True
            assert torch.equal(layer.mask.flatten(), kept)
        optimizer.zero_grad()
    assert changes == [4, 8, 12]


def test_set_drops_the_same_share_of_both_signs_and_needs_no_dense_gradient() -> None:
    made = parts(SET, update_every=4, drop_fraction=0.5, regrown="zero")
    model, optimizer, sparsifier = made
    for at in range(8):
        layer = sparsifier.layers["0"]
        inputs, targets = batch(at)
        nn.functional.cross_entropy(model(inputs), targets).backward()
        assert not layer.weight.grad[~layer.mask].any()
        optimizer.step()
        before, weight = layer.mask, layer.weight.clone()
        if sparsifier.step():
            kept = before & (layer.weight != 0)  # what grew again is zero
            assert int(kept.sum()) == int(before.sum()) - math.ceil(0.5 * int(before.sum()))
            for sign in (weight > 0, weight < 0):
                there, left = int((before & sign).sum()), int((kept & sign).sum())
                assert abs(left - there / 2) <= 1.5  # both counts are rounded
                dropped = before & sign & ~kept
                assert weight[dropped].abs().max() <= weight[kept & sign].abs().min()
        optimizer.zero_grad()


def test_snip_keeps_the_weights_to_which_the_loss_is_most_sensitive() -> None:
    model = network()
    inputs, targets = batch(0)
    nn.functional.cross_entropy(model(inputs), targets).backward()
    scores = torch.cat(
        [(m.weight * m.weight.grad).flatten() for m in masked_layers(model).values()]
    )
    made, _, sparsifier = parts(SNIP)
    before = copy.deepcopy(made.state_dict())
    sparsifier.start([batch(0)])
    kept = torch.cat([mask.flatten() for mask in masks(sparsifier)])
    best = scores.detach().abs().sort(descending=True).indices[: sparsifier.target_active]
    assert set(kept.nonzero().flatten().tolist()) == set(best.tolist())
    for name, layer in sparsifier.layers.items():
        assert torch.equal(layer.weight, before[f"{name}.weight"] * layer.mask)
        assert layer.weight.grad is None


def test_grasp_keeps_what_the_whole_hessian_says() -> None:
    model = densify(network()).double()
    weights = [model[index].weight for index in (0, 2, 4)]
    inputs, targets = batch(0)

    def loss(*values: Tensor) -> Tensor:
        named = dict(zip(("0.weight", "2.weight", "4.weight"), values, strict=True))
        outputs = torch.func.functional_call(model, named, (inputs.double(),))
        return nn.functional.cross_entropy(outputs / GraSP.temperature, targets)

    values = tuple(weight.detach() for weight in weights)
    gradient = torch.cat([g.flatten() for g in torch.autograd.functional.jacobian(loss, values)])
    blocks = torch.autograd.functional.hessian(loss, values)
    numels = [value.numel() for value in values]
    rows = [
        torch.cat([block.reshape(numel, -1) for block in row], 1)
        for row, numel in zip(blocks, numels, strict=True)
    ]
    change = -torch.cat([value.flatten() for value in values]) * (torch.cat(rows) @ gradient)
    _, _, sparsifier = parts(GraSP)
    sparsifier.start([batch(0)])
    kept = torch.cat([mask.flatten() for mask in masks(sparsifier)])
    removed_first = change.sort(descending=True).indices
    expected = set(removed_first[-sparsifier.target_active :].tolist())
    got = set(kept.nonzero().flatten().tolist())
    assert len(expected ^ got) <= 2  # float32 beside float64


def test_synflow_needs_no_data_and_lets_no_layer_collapse() -> None:
    chosen = []
    for at in (0, 7):
        _, _, sparsifier = parts(SynFlow, sparsity=0.97, floor=0)
        sparsifier.start([batch(at)])
        chosen.append(masks(sparsifier))
    assert all(map(torch.equal, *chosen))
    assert all(mask.any() for mask in chosen[0])
    # Active weights lie on paths from the input to the output; the last round may have cut a few.
    first, second, third = chosen[0]
    assert int((first.any(1) != second.any(0)).sum()) <= 2
    assert int((second.any(1) != third.any(0)).sum()) <= 2


def test_methods_that_prune_at_the_start_say_when_they_were_not_started() -> None:
    made = parts(SNIP)
    with pytest.raises(RuntimeError, match=r"SNIP: call start\(\) before the first step"):
        step(*made, 0)
    made = parts(SNIP)
    with pytest.raises(ValueError, match="batches: expected at least one batch, got none"):
        made[2].start([])
    made[2].start([batch(0)])
    with pytest.raises(RuntimeError, match="a second time"):
        made[2].start([batch(0)])


@pytest.mark.parametrize("rewind_to", [0, 2])
def test_lottery_tickets_return_to_the_early_weights(rewind_to: int) -> None:
    model, optimizer, sparsifier = parts(LotteryTicket, rounds=3, rewind_to=rewind_to)
    assert sparsifier.round_steps == 6
    early = copy.deepcopy(model.state_dict())
    counts = [sum(sparsifier.active_counts())]
    for at in range(STEPS):
        changed = step(model, optimizer, sparsifier, at)
        if at + 1 == rewind_to:
            early = copy.deepcopy(model.state_dict())
        assert changed == ((at + 1) in (6, 12, 18))
        if changed:
            counts.append(sum(sparsifier.active_counts()))
            assert not optimizer.state
            for name, layer in sparsifier.layers.items():
                assert torch.equal(layer.weight, early[f"{name}.weight"] * layer.mask)
                assert torch.equal(model.get_submodule(name).bias, early[f"{name}.bias"])
    assert counts == [
        624,
        624 - round(624 * (1 - 0.2 ** (1 / 3))),
        624 - round(624 * (1 - 0.2 ** (2 / 3))),
        125,
    ]
    assert [sparsifier.step_of_round(at) for at in (0, 5, 6, 17, 18, 23)] == [0, 5, 0, 5, 0, 5]


@pytest.mark.parametrize("floor", [1, 3])
def test_no_layer_falls_below_its_floor(floor: int) -> None:
    model = network()
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
    optimizer = MaskedSGD(model.parameters(), lr=0.0)
    sparsifier = GraNet(
        model, optimizer, sparsity=0.95, total_steps=STEPS, update_every=2, floor=floor
    )
    for at in range(STEPS):
        step(model, optimizer, sparsifier, at)
    assert sparsifier.active_counts()[1] == floor
    assert sum(sparsifier.active_counts()) == sparsifier.target_active


def test_redistribution_gives_more_to_the_layers_worth_more() -> None:
    assert shares(10, [30.0, 10.0, 0.0], [10, 10, 10], [100, 100, 100]) == [8, 2, 0]
    assert shares(10, [30.0, 10.0, 0.0], [10, 10, 10], [4, 100, 100]) == [4, 6, 0]
    assert sum(shares(7, [0.0, 0.0], [5, 5], [10, 10])) == 7
    assert shares(0, [1.0], [1], [0]) == [0]
    assert sum(shares(9, [float("nan"), 1.0], [5, 5], [10, 10])) == 9


def test_growth_by_momentum_is_the_decayed_sum_of_dense_gradients() -> None:
    made = parts(GraNet, update_every=24, total_steps=48, grow="momentum", initial_sparsity=0.5)
    model, optimizer, sparsifier = made
    layer, expected = sparsifier.layers["0"], torch.zeros(20, 12)
    for at in range(23):
        inputs, targets = batch(at)
        nn.functional.cross_entropy(model(inputs), targets).backward()
        gradient = layer.weight.grad.clone()
        assert bool(gradient[~layer.mask].any()) == (at >= 4)  # the twenty steps up to the update
        expected = 0.9 * expected + gradient if at >= 4 else expected
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
    scores = sparsifier.growth.scores(
        sparsifier.layers, sparsifier.topology.place, torch.Generator()
    )
    torch.testing.assert_close(scores["0"], expected)


# --- the list of them -----------------------------------------------------------------------------


def test_every_method_has_a_page_and_a_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    for name, method in METHODS.items():
        assert name == method.name
        assert f"\n{name} " in f"\n{printed}"
        assert method.source in printed
        assert method.__doc__
        assert inspect.getmodule(method).__doc__
        assert main(["methods", name]) == 0
    page = capsys.readouterr().out
    assert "--prune-at            prune_at            50%" in page
    with pytest.raises(SystemExit):
        main(["methods", "none"])
    assert "name: expected one of granet, gmp," in capsys.readouterr().err
