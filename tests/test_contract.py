"""What holds for every method in real training: resuming, scalers, accumulation, starts, odd models.

Weights, states and averages are in ``test_contract_states.py``, several processes in ``test_ddp.py`` and
``test_fsdp.py``.
"""

from __future__ import annotations

import copy
import io
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from granet import METHODS, GraNet
from granet.methods import SET, OneShot, StaticRandom
from granet.monitor import TopologyMonitor
from granet_kernels import MaskedLinear, MaskedSGD, sparsify
from tests.contract_parts import (  # noqa: F401
    OPTIMIZERS,
    SETTINGS,
    STEPS,
    Optimizer,
    backward,
    batch,
    masks,
    network,
    reference_backend,
    same_masks,
    sgd,
    train,
)

# --- resuming --------------------------------------------------------------------------------------

METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "granet": {"update_every": 4, "initial_sparsity": 0.5},
    "gmp": {"update_every": 4},
    "rigl": {"update_every": 4},
    "rigl-itop": {"update_every": 4},
    "set": {"update_every": 4},
    "synflow": {"rounds": 5},
    "lottery-ticket": {"rounds": 3, "rewind_to": 2},
    "one-shot": {"prune_at": 7},
    "momentum growth": {
        "update_every": 8,
        "initial_sparsity": 0.5,
        "grow": "momentum",
        "redistribution": "momentum",
    },
    "random everything": {
        "update_every": 3,
        "initial_sparsity": 0.5,
        "grow": "random",
        "drop": "random",
        "redistribution": "magnitude",
        "regrown": "zero",
    },
}
KINDS = [*METHODS, "momentum growth", "random everything"]


def make(kind: str, seed: int = 0) -> tuple[nn.Module, Optimizer, Any]:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2) if kind == "set" else sgd(model)
    settings = {"sparsity": 0.8, "total_steps": STEPS} | METHOD_SETTINGS.get(kind, {})
    method: Any = METHODS.get(kind, GraNet)
    return model, optimizer, method(model, optimizer, seed=seed, **settings)


def everything(parts: tuple[nn.Module, Optimizer, Any]) -> list[dict[str, Any]]:
    return [copy.deepcopy(part.state_dict()) for part in parts]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_at_every_step_is_the_same_bit_for_bit(kind: str) -> None:
    whole = make(kind)
    pieces = make(kind)
    for parts in (whole, pieces):
        if hasattr(parts[2], "start"):
            parts[2].start([batch(0)])
    train(*whole)
    for step in range(STEPS):
        train(*pieces, step, step + 1)
        saved = io.BytesIO()
        torch.save(everything(pieces), saved)
        saved.seek(0)
        torch.manual_seed(step)  # another process has another random state
        pieces = make(kind, seed=99)
        for part, state in zip(pieces, torch.load(saved, weights_only=True), strict=True):
            part.load_state_dict(state)
    assert _equal(everything(pieces), everything(whole))


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(_equal, left, right))
    return bool(left == right)


# --- skipped steps, scores that are not finite -----------------------------------------------------


@pytest.mark.parametrize("name", ["MaskedSGD", "SGD", "AdamW"])
def test_a_skipped_step_moves_neither_counters_nor_masks_nor_momentum(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model)
    sparsifier = GraNet(model, optimizer, initial_sparsity=0.5, **(SETTINGS | {"update_every": 2}))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(8):
        images, labels = batch(step)
        scaler.scale(nn.functional.cross_entropy(model(images), labels)).backward()
        infinite = step in (1, 2, 5)  # 1 would have been an update
        if infinite:
            model[4].weight.grad[0, 0] = torch.inf
        before = everything((model, optimizer, sparsifier))
        scaler.step(optimizer)
        scaler.update()
        updated = sparsifier.step()
        optimizer.zero_grad()
        if infinite:
            assert not updated
            after = everything((model, optimizer, sparsifier))
            assert _equal(after, before)
    assert sparsifier.steps == 5


@pytest.mark.parametrize("grow", ["gradient", "momentum"])
def test_scores_that_are_not_finite_postpone_an_update(
    grow: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    optimizer = sgd(model)
    sparsifier = GraNet(model, optimizer, initial_sparsity=0.5, grow=grow, **SETTINGS)
    updates = []
    with caplog.at_level(logging.WARNING, "granet"):
        for step in range(9):
            backward(model, step)
            if step in (3, 4):  # the update of step 4, and the one it waits for
                layer = sparsifier.layers["4"]
                assert bool(layer.weight.grad[~layer.mask].any())
                inactive = (~layer.mask).nonzero()[0]
                layer.weight.grad[tuple(inactive)] = torch.nan if step == 3 else torch.inf
            optimizer.step()
            before = masks(sparsifier)
            if sparsifier.step():
                updates.append(sparsifier.steps)
            else:
                assert same_masks(masks(sparsifier), before)
            optimizer.zero_grad()
    assert updates == [6, 8]
    assert len(caplog.records) == 2
    assert "step 5: growth scores are not finite; the update of step 4 waits" in caplog.text
    assert all(torch.isfinite(layer.weight).all() for layer in sparsifier.layers.values())


# --- accumulation ----------------------------------------------------------------------------------


def test_growth_scores_are_the_gradient_of_the_whole_accumulated_batch() -> None:
    results = []
    for pieces in (1, 4):
        model = network(torch.float64)
        model[1].eval()  # its statistics would see batches of other sizes
        optimizer = sgd(model)
        sparsifier = GraNet(
            model, optimizer, initial_sparsity=0.5, **(SETTINGS | {"total_steps": 9})
        )
        for step in range(9):
            images, labels = batch(step, torch.float64)
            for part, target in zip(images.chunk(pieces), labels.chunk(pieces), strict=True):
                loss = nn.functional.cross_entropy(model(part), target)
                (loss / pieces).backward()
                assert sparsifier.step() is False  # no step was taken
            optimizer.step()
            sparsifier.step()
            optimizer.zero_grad()
        results.append(masks(sparsifier))
    assert same_masks(*results)


# --- where a run starts, and where masks stop ------------------------------------------------------


def test_from_a_dense_checkpoint() -> None:
    dense = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, 9),
        nn.Linear(9, 4),
    )
    model = network()
    model.load_state_dict(dense.state_dict())
    optimizer = sgd(model)
    sparsifier = GraNet(model, optimizer, **SETTINGS)
    assert sum(sparsifier.active_counts()) == sparsifier.numel
    train(model, optimizer, sparsifier)
    assert sum(sparsifier.active_counts()) == sparsifier.target_active


def test_from_the_zeros_of_a_sparse_checkpoint() -> None:
    sparse, _, trained = make("granet")
    train(sparse, trained.topology.optimizer, trained)
    weights = {k: v for k, v in sparse.state_dict().items() if not k.endswith("packed_mask")}
    model = network()
    model.load_state_dict(weights)
    optimizer = sgd(model)
    sparsifier = OneShot(
        model, optimizer, sparsity=0.8, total_steps=STEPS, prune_at=0, init="from_zeros"
    )
    assert same_masks(masks(sparsifier), masks(trained))
    train(model, optimizer, sparsifier)  # sparse fine-tuning
    assert same_masks(masks(sparsifier), masks(trained))
    with pytest.raises(ValueError, match="model: expected at least"):
        GraNet(model, sgd(model), init="from_zeros", **(SETTINGS | {"sparsity": 0.1}))


def test_a_frozen_topology_stays_and_is_saved_as_such() -> None:
    model, optimizer, sparsifier = make("granet")
    train(model, optimizer, sparsifier, 0, 5)
    sparsifier.freeze()
    frozen = masks(sparsifier)
    train(model, optimizer, sparsifier, 5, 10)
    states = everything((model, optimizer, sparsifier))
    again = make("granet")
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    train(*again, 10)
    assert same_masks(masks(again[2]), frozen)
    assert not any(layer.dense_grad for layer in again[2].layers.values())


# --- models that are not as usual ------------------------------------------------------------------


def test_tied_weights_have_one_mask_and_are_counted_once() -> None:
    first, second, third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
    second.weight = first.weight
    model = sparsify(nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), third))
    optimizer = sgd(model)
    sparsifier = GraNet(model, optimizer, **SETTINGS)
    assert list(sparsifier.layers) == ["0", "4"]
    assert sparsifier.numel == 64 + 16
    for _step in range(STEPS):
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
    assert sum(sparsifier.active_counts()) == sparsifier.target_active
    assert model[0].packed_mask is model[2].packed_mask


def test_a_frozen_layer_is_pruned_and_regrows_nothing() -> None:
    model = network()
    model[4].weight.requires_grad_(False)
    optimizer = MaskedSGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    sparsifier = GraNet(model, optimizer, **SETTINGS)
    for step in range(STEPS):
        before = model[4].mask
        train(model, optimizer, sparsifier, step, step + 1)
        assert not (model[4].mask & ~before).any()
    assert model[4].sparsity > 0
    assert sum(sparsifier.active_counts()) == sparsifier.target_active


@pytest.mark.parametrize("method", [GraNet, SET])
def test_a_layer_that_is_not_used_has_no_gradient_and_no_harm(method: Any) -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = MaskedLinear(9, 9), MaskedLinear(9, 9)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.used(inputs)  # type: ignore[no-any-return]

    model = Partly()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier = method(model, optimizer, **SETTINGS)
    for _ in range(STEPS):
        model(torch.randn(4, 9)).square().mean().backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
    assert sum(sparsifier.active_counts()) == sparsifier.target_active


def test_a_model_without_a_layer_to_mask_is_refused() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    with pytest.raises(ValueError, match="model: expected masked layers in it, got none"):
        StaticRandom(model, torch.optim.SGD(model.parameters()), sparsity=0.5, total_steps=9)


# --- the cost of steps in between -----------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Refuses what would wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.is_nonzero.default,
        ), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["MaskedSGD", "SGD"])
def test_no_step_outside_updates_waits_for_the_device(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model)
    sparsifier = GraNet(model, optimizer, initial_sparsity=0.5, **SETTINGS)
    rows: list[Any] = []
    TopologyMonitor(sparsifier, rows.extend)
    for step in range(STEPS):
        backward(model, step)
        if (step + 1) % 4:
            with NoWaiting():
                optimizer.step()
                sparsifier.step()
        else:
            optimizer.step()
            sparsifier.step()
        optimizer.zero_grad()
    assert {row.step for row in rows} == {4, 8, 12, 16}
