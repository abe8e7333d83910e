"""Where sparse training breaks at its edges: late updates, odd states, copies."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from granet import GraNet
from granet.distributed import leave_masks_alone
from granet.methods import SNIP, LotteryTicket, RigL, StaticRandom
from granet.monitor import TopologyMonitor
from granet_kernels import MaskedSGD, sparsify
from tests.two_linears import (  # noqa: F401
    STEPS,
    network,
    reference_backend,
    sgd,
    step,
)

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
