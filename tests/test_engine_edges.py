"""Where sparse training breaks at its edges: late updates, odd states, copies, what is refused."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from granet import METHODS, GraNet
from granet.distributed import leave_masks_alone
from granet.distributions import Explicit
from granet.methods import GMP, SNIP, GraSP, LotteryTicket, OneShot, RigL, StaticRandom, SynFlow
from granet.monitor import TopologyMonitor
from granet.redistribution import shares
from granet_kernels import MaskedSGD, masked_layers, sparsify, use_backend

STEPS = 20


@pytest.fixture(autouse=True)
def reference_backend() -> Iterator[None]:
    with use_backend("reference"):
        yield


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return sparsify(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))


def sgd(model: nn.Module, momentum: float = 0.9) -> MaskedSGD:
    return MaskedSGD(model.parameters(), lr=0.01, momentum=momentum)


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: Any, poison: bool = False
) -> bool:
    generator = torch.Generator().manual_seed(sparsifier.steps)
    model(torch.randn(8, 8, generator=generator)).square().mean().backward()
    if poison:
        layer = sparsifier.layers["0"]
        layer.weight.grad[~layer.mask] = torch.nan
    optimizer.step()
    try:
        return bool(sparsifier.step())
    finally:
        optimizer.zero_grad()


# --- postponed updates ----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [(3,), (3, 4), (2, 3, 4, 5)])
def test_a_postponed_prune_is_made_up_for(bad: tuple[int, ...]) -> None:
    model = network()
    optimizer = sgd(model)
    sparsifier = GraNet(
        model,
        optimizer,
        sparsity=0.9,
        initial_sparsity=0.5,
        total_steps=STEPS,
        update_every=1,
        ramp="linear",
        prune_until=4,
    )
    for at in range(STEPS):
        step(model, optimizer, sparsifier, poison=at in bad)
    assert sum(sparsifier.active_counts()) == sparsifier.target_active


def test_an_update_postponed_to_the_last_step_regrows_nothing() -> None:
    model = network()
    optimizer = sgd(model)
    sparsifier = RigL(
        model, optimizer, sparsity=0.5, total_steps=16, update_every=5, update_until="100%"
    )
    for at in range(15):
        step(model, optimizer, sparsifier, poison=at == 14)
    before = [layer.mask for layer in sparsifier.layers.values()]
    step(model, optimizer, sparsifier)
    after = [layer.mask for layer in sparsifier.layers.values()]
    assert all(map(torch.equal, before, after))


# --- copies and observers -------------------------------------------------------------------------


def test_followers_hear_of_a_start_and_of_a_load() -> None:
    model = network()
    follower = copy.deepcopy(model)
    optimizer = sgd(model)
    sparsifier = SNIP(model, optimizer, sparsity=0.7, total_steps=30)
    sparsifier.follow(follower)
    changes: list[Any] = []
    sparsifier.observers.append(changes.append)
    sparsifier.start([(torch.randn(4, 8), torch.zeros(4, dtype=torch.long))])
    assert torch.equal(follower[0].mask, model[0].mask)
    assert not follower[0].weight[~model[0].mask].any()
    assert len(changes) == 1
    state = sparsifier.state_dict()
    state["masks"] = {name: torch.zeros_like(mask) for name, mask in state["masks"].items()}
    sparsifier.load_state_dict(state)
    assert not follower[0].mask.any()


def test_a_copied_model_does_not_keep_the_flag_of_dense_gradients() -> None:
    model = network()
    optimizer = sgd(model)
    sparsifier = RigL(model, optimizer, sparsity=0.7, total_steps=30, update_every=2)
    step(model, optimizer, sparsifier)
    assert model[0].dense_grad
    copied = copy.deepcopy(model)
    StaticRandom(copied, sgd(copied), sparsity=0.7, total_steps=30)
    assert not copied[0].dense_grad
    state = sparsifier.state_dict()
    sparsifier.remove()
    sparsifier.load_state_dict(state)
    assert not model[0].dense_grad


def test_a_sink_that_raises_leaves_no_flag_and_takes_no_row_from_others() -> None:
    model = network()
    optimizer = sgd(model)
    sparsifier = RigL(model, optimizer, sparsity=0.7, total_steps=30, update_every=2)
    rows: list[Any] = []

    def fails(_: object) -> None:
        raise OSError("disk full")

    TopologyMonitor(sparsifier, fails, rows.extend)
    for _ in range(3):
        step(model, optimizer, sparsifier)
    with pytest.raises(OSError, match="disk full"):  # the rows of step 2, at the next update
        step(model, optimizer, sparsifier)
    assert [row.step for row in rows] == [2, 2]
    assert not model[0].dense_grad


def test_a_monitor_follows_a_change_of_memory_format() -> None:
    seen = []
    for changes in (False, True):
        torch.manual_seed(0)
        model = sparsify(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)))
        optimizer = sgd(model)
        sparsifier = GraNet(
            model, optimizer, sparsity=0.8, initial_sparsity=0.5, total_steps=STEPS, update_every=2
        )
        rows: list[Any] = []
        monitor = TopologyMonitor(sparsifier, rows.extend)
        for at in range(8):
            if changes and at == 3:
                model.to(memory_format=torch.channels_last)
            generator = torch.Generator().manual_seed(at)
            model(torch.randn(2, 3, 7, 7, generator=generator)).square().mean().backward()
            optimizer.step()
            sparsifier.step()
            optimizer.zero_grad()
        monitor.flush()
        seen.append([(row.explored, row.survival, row.regrown) for row in rows])
    assert seen[0] == seen[1]


# --- states ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("opt", ["MaskedSGD", "SGD", "AdamW"])
def test_regrown_weights_start_from_no_momentum_whatever_its_signs(opt: str) -> None:
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Linear(8, 4, bias=False)))
    optimizer = {
        "MaskedSGD": lambda p: MaskedSGD(p, lr=0.01, momentum=0.9),
        "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    }[opt](model.parameters())
    sparsifier = RigL(model, optimizer, sparsity=0.5, total_steps=STEPS, update_every=2)
    before = model[0].mask
    for _ in range(2):
        model(torch.rand(5, 8)).sum().backward()  # all gradients are positive
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
    grown = model[0].mask & ~before
    state = optimizer.state[model[0].weight]
    name = "exp_avg" if opt == "AdamW" else "momentum_buffer"
    assert grown.any()
    assert not state[name][grown].any()


def test_lottery_tickets_leave_other_models_in_the_optimizer_alone() -> None:
    model, other = network(), nn.Linear(3, 2)
    optimizer = torch.optim.Adam([*model.parameters(), *other.parameters()])
    sparsifier = LotteryTicket(model, optimizer, sparsity=0.5, total_steps=8, rounds=1)
    for _ in range(4):
        other(torch.randn(2, 3)).sum().backward()
        step(model, optimizer, sparsifier)
    assert not optimizer.state.get(model[0].weight)
    assert int(optimizer.state[other.weight]["step"]) == 4


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"a": 1}

    def set_extra_state(self, state: object) -> None:
        pass


def test_lottery_tickets_take_modules_with_a_state_of_their_own() -> None:
    model = nn.Sequential(*network(), WithExtraState(4, 4))
    optimizer = sgd(model)
    sparsifier = LotteryTicket(model, optimizer, sparsity=0.5, total_steps=8, rounds=1)
    for _ in range(8):
        step(model, optimizer, sparsifier)
    assert sum(sparsifier.active_counts()) == sparsifier.target_active


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop("updated"), "expected an engine entry with"),
        (lambda e: e.update(due="a"), "expected engine['due'] from 0 and above, got 'a'"),
        (lambda e: e.update(updated=True), "expected engine['updated'] from 0 and above, got True"),
        (lambda e: e.update(growth=None), "expected means of growth, got None"),
        (lambda e: e.update(growth={"9": torch.ones(2)}), "expected growth of 0, 2, got '9'"),
        (lambda e: e.update(growth={"0": torch.ones(2)}), "growth['0']: expected shape (16, 8)"),
        (lambda e: e.update(method={"a": 1}), "expected nothing of granet's own, got ['a']"),
    ],
)
def test_a_bad_engine_entry_changes_nothing(change: Any, message: str) -> None:
    model = network()
    sparsifier = GraNet(
        model, sgd(model), sparsity=0.8, initial_sparsity=0.5, total_steps=9, update_every=2
    )
    state = copy.deepcopy(sparsifier.state_dict())
    state["masks"] = {name: torch.zeros_like(mask) for name, mask in state["masks"].items()}
    state["steps"] = 4
    change(state["engine"])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=re.escape(message)):
        sparsifier.load_state_dict(state)
    assert sparsifier.steps == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


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


# --- the program ----------------------------------------------------------------------------------


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
def test_a_zero_on_the_command_line_is_a_value(fields: dict[str, Any], argument: str) -> None:
    pytest.importorskip("pydantic")
    from granet.training import build
    from granet.training.config import TrainConfig

    arguments = build._method_arguments(TrainConfig(**fields), 1000)
    assert arguments[argument] == 0


def test_masks_are_left_out_of_a_compiled_wrapper_too(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = DistributedDataParallel(network())
        leave_masks_alone(torch.compile(wrapped))  # type: ignore[arg-type]
        assert "0.packed_mask" in wrapped.parameters_to_ignore
        assert wrapped.modules_buffers == []
    finally:
        torch.distributed.destroy_process_group()


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
