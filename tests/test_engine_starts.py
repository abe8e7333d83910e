"""What the engine starts from, and what it refuses before it does."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from granet import METHODS, GraNet
from granet.distributions import Explicit
from granet.methods import GMP, SNIP, GraSP, LotteryTicket, OneShot, RigL, StaticRandom, SynFlow
from granet.redistribution import shares
from granet_kernels import masked_layers, sparsify
from tests.two_linears import (  # noqa: F401
    STEPS,
    network,
    reference_backend,
    sgd,
    step,
)

# --- what is refused, and when --------------------------------------------------------------------


@pytest.mark.parametrize("method", [SNIP, GraSP, SynFlow])
def test_scores_that_are_not_finite_prune_nothing(method: Any) -> None:
    model = network()
    sparsifier = method(model, sgd(model), sparsity=0.7, total_steps=9)
    if method is SynFlow:
        with torch.no_grad():
            model[0].weight[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match=rf"{method.name}: scores of 0, 2 are not finite"):
        sparsifier.start([(torch.full((4, 8), torch.nan), torch.zeros(4, dtype=torch.long))])
    assert sum(sparsifier.active_counts()) == sparsifier.numel


def test_momentum_redistribution_is_refused_beforehand() -> None:
    model = network()
    optimizer = sgd(model, momentum=0.0)
    with pytest.raises(ValueError, match="redistribution: 'momentum' expected an optimizer with"):
        RigL(model, optimizer, sparsity=0.5, total_steps=9, redistribution="momentum")
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("fraction", [1.5, -0.1, float("nan")])
def test_a_schedule_out_of_range_changes_nothing(fraction: float) -> None:
    model = network()
    optimizer = sgd(model)
    sparsifier = GraNet(
        model,
        optimizer,
        sparsity=0.8,
        total_steps=9,
        update_every=1,
        drop_fraction=lambda _: fraction,
    )
    before = sparsifier.active_counts()
    with pytest.raises(ValueError, match="drop_fraction: expected numbers in"):
        step(model, optimizer, sparsifier)
    assert sparsifier.active_counts() == before


def test_explicit_sparsities_must_make_the_target() -> None:
    model = network()
    with pytest.raises(
        ValueError, match=r"distribution: expected sparsities of layers that make 0.9, got 0.5"
    ):
        StaticRandom(
            model, sgd(model), sparsity=0.9, total_steps=9, distribution=Explicit((0.5, 0.5))
        )


@pytest.mark.parametrize("method", [LotteryTicket, SNIP, GMP])
def test_masks_sparser_than_the_target_are_refused(method: Any) -> None:
    model = network()
    for layer in masked_layers(model).values():
        layer.mask = torch.zeros_like(layer.weight, dtype=torch.bool).index_fill_(
            0, torch.tensor([0]), True
        )
    settings = {"rounds": 1} if method is LotteryTicket else {}
    with pytest.raises(ValueError, match=r"model: expected at least .* active weights"):
        method(model, sgd(model), sparsity=0.5, total_steps=2000, **settings)


def test_per_layer_prunes_of_masks_that_are_there() -> None:
    model = network()
    for layer in masked_layers(model).values():
        layer.mask = torch.rand(layer.weight.shape) < 0.3
    optimizer = sgd(model)
    sparsifier = GMP(
        model, optimizer, sparsity=0.9, total_steps=STEPS, update_every=2, scope="layer"
    )
    for _ in range(STEPS):
        step(model, optimizer, sparsifier)
    assert sum(sparsifier.active_counts()) == sparsifier.target_active


def test_all_layers_frozen_is_no_error() -> None:
    model = network()
    for layer in masked_layers(model).values():
        layer.weight.requires_grad_(False)
    optimizer = sgd(model)
    sparsifier = GraNet(model, optimizer, sparsity=0.8, total_steps=STEPS, update_every=2)
    for _ in range(STEPS):
        step(model, optimizer, sparsifier)
    assert sum(sparsifier.active_counts()) == sparsifier.target_active


def test_frozen_before_its_target_is_not_final() -> None:
    model = network()
    optimizer = sgd(model)
    sparsifier = GraNet(model, optimizer, sparsity=0.8, total_steps=STEPS, update_every=2)
    for _ in range(3):
        step(model, optimizer, sparsifier)
    sparsifier.freeze()
    reached = sparsifier.sparsity
    for _ in range(STEPS - 3):
        step(model, optimizer, sparsifier)
    assert not sparsifier.is_final
    assert sparsifier.sparsity == reached < 0.8


def test_gradients_that_are_all_zero_are_wondered_at(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    optimizer = sgd(model)
    sparsifier = RigL(model, optimizer, sparsity=0.5, total_steps=9, update_every=1)
    model(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    sparsifier.step()
    assert "all growth scores are zero; was zero_grad() called before step()?" in caplog.text


def test_subnormal_magnitudes_are_shared_by() -> None:
    assert shares(10, [3e-310, 1e-310], [1, 1], [100, 100]) == [8, 2]


BAD_ARGUMENTS: list[tuple[str, dict[str, Any], str]] = [
    ("granet", {"sparsity": "0.9"}, "sparsity: expected a number in [0, 1), got '0.9'"),
    ("granet", {"sparsity": None}, "sparsity: expected a number in [0, 1), got None"),
    (
        "granet",
        {"initial_sparsity": None},
        "initial_sparsity: expected a number in [0, 1), got None",
    ),
    ("granet", {"floor": 1.5}, "floor: expected an integer of at least 0, got 1.5"),
    ("granet", {"floor": "2"}, "floor: expected an integer of at least 0, got '2'"),
    ("granet", {"update_every": "5"}, "update_every: expected a step or a percentage like"),
    ("granet", {"update_every": 2.5}, "update_every: expected a number of steps, got 2.5"),
    ("granet", {"drop_fraction": "x"}, "drop_fraction: expected a number in [0, 1], got 'x'"),
    ("granet", {"grow": None}, "grow: expected one of gradient, momentum, random, got None"),
    ("static", {"total_steps": "100"}, "total_steps: expected an integer of at least 1, got '100'"),
    ("static", {"total_steps": 0}, "total_steps: expected an integer of at least 1, got 0"),
    ("snip", {"total_steps": -5}, "total_steps: expected an integer of at least 1, got -5"),
    ("one-shot", {"sparsity": float("nan")}, "sparsity: expected a number in [0, 1), got nan"),
    ("lottery-ticket", {"rounds": "3"}, "rounds: expected an integer of at least 1, got '3'"),
    ("lottery-ticket", {"rounds": 1.5}, "rounds: expected an integer of at least 1, got 1.5"),
    ("synflow", {"rounds": 1.5}, "rounds: expected an integer of at least 1, got 1.5"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_named(name: str, change: dict[str, Any], message: str) -> None:
    model = network()
    optimizer = sgd(model)
    before = copy.deepcopy(model.state_dict())
    method: Any = METHODS[name]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        method(model, optimizer, **({"sparsity": 0.5, "total_steps": 2000} | change))
    assert not optimizer._optimizer_step_post_hooks
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- masks to start from ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rigl", "set", "static", "granet"])
@pytest.mark.parametrize("start", ["masks", "from_zeros"])
def test_no_random_masks_over_what_was_trained_sparsely(method: str, start: str) -> None:
    model = network()
    trained = OneShot(model, sgd(model), sparsity=0.7, total_steps=9, prune_at=0)
    trained.remove()
    weights = {name: layer.weight.detach().clone() for name, layer in trained.layers.items()}
    if start == "from_zeros":
        model = sparsify(network())
        model.load_state_dict({f"{n}.weight": w for n, w in weights.items()}, strict=False)
    settings: dict[str, Any] = {"init": start, "sparsity": 0.7, "total_steps": 30}
    if method == "granet":
        settings |= {"initial_sparsity": 0.7, "update_every": 5}
    sparsifier: Any = METHODS[method](model, sgd(model), **settings)  # type: ignore[arg-type]
    assert sum(sparsifier.active_counts()) == sparsifier.target_active
    for name, layer in sparsifier.layers.items():
        assert torch.equal(layer.weight, weights[name])


def test_existing_masks_are_pruned_to_the_initial_sparsity() -> None:
    model = network()
    OneShot(model, sgd(model), sparsity=0.3, total_steps=9, prune_at=0).remove()
    sparsifier = RigL(model, sgd(model), sparsity=0.7, total_steps=30, update_every=5)
    assert sum(sparsifier.active_counts()) == sparsifier.target_active


def test_model_and_optimizer_are_looked_at_first() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="model: expected masked layers in it, got none"):
        GraNet(model, torch.optim.SGD(model.parameters()), sparsity=2.0, total_steps=0)
    with pytest.raises(ValueError, match=r"optimizer: .* without 0.weight"):
        GraNet(network(), sgd(network()), sparsity=0.5, total_steps=10)
    text = str(inspect.signature(GraNet))
    assert "sparsity: 'float'" in text
    assert "drop_fraction" in text


def test_what_a_sparsifier_prints() -> None:
    model = network()
    sparsifier = GraNet(model, sgd(model), sparsity=0.5, total_steps=10, update_every="20%")
    assert repr(sparsifier) == "GraNet(step 0 of 10, sparsity 0.0000, 2 layers of 192 weights)"
    assert sparsifier.clock.every == 2


def test_steps_without_a_call_are_wondered_at() -> None:
    model = network()
    optimizer = sgd(model)
    GraNet(model, optimizer, sparsity=0.5, total_steps=1000, update_every=10)
    model(torch.randn(2, 8)).sum().backward()
    for _ in range(99):
        optimizer.step()
    with pytest.warns(UserWarning, match=r"100 steps without a call of sparsifier.step\(\)"):
        optimizer.step()


def test_one_shot_at_the_start_and_no_more() -> None:
    model = network()
    optimizer = sgd(model)
    sparsifier = OneShot(model, optimizer, sparsity=0.5, total_steps=9, prune_at=0)
    assert sum(sparsifier.active_counts()) == sparsifier.target_active
    kept: list[Tensor] = [layer.mask for layer in sparsifier.layers.values()]
    for _ in range(9):
        step(model, optimizer, sparsifier)
    assert all(map(torch.equal, kept, [layer.mask for layer in sparsifier.layers.values()]))
