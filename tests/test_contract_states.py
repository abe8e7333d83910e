"""Under every optimizer: what is inactive is zero, what regrows is as its policy says, averages follow."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from granet import GraNet
from granet.methods import RigL
from granet.schedules import Constant
from granet_kernels import MaskedSGD, masked_layers, sparsify
from tests.contract_parts import (  # noqa: F401
    OPTIMIZERS,
    SETTINGS,
    STEPS,
    backward,
    masks,
    network,
    reference_backend,
    same_masks,
    sgd,
    train,
)

# --- optimizers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("regrown", ["keep", "zero", "layer_mean"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_inactive_weights_and_states_are_zero_after_every_step(name: str, regrown: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model)
    sparsifier = GraNet(
        model,
        optimizer,
        initial_sparsity=0.5,
        regrown=regrown,  # type: ignore[arg-type]
        **SETTINGS,
    )
    for step in range(STEPS):
        train(model, optimizer, sparsifier, step, step + 1)
        for layer in sparsifier.layers.values():
            inactive = ~layer.mask
            assert not layer.weight[inactive].any()
            for key, state in optimizer.state[layer.weight].items():
                if torch.is_tensor(state) and state.shape == layer.weight.shape:
                    assert not state[inactive].any(), (step, key)
    assert sum(sparsifier.active_counts()) == sparsifier.target_active


@pytest.mark.parametrize("regrown", ["keep", "zero", "layer_mean"])
def test_regrown_weights_start_as_their_policy_says(regrown: str) -> None:
    model = network()
    optimizer = sgd(model)
    sparsifier = RigL(
        model,
        optimizer,
        regrown=regrown,  # type: ignore[arg-type]
        drop_fraction=Constant(value=1.0),  # all are dropped, so many of them grow again at once
        **SETTINGS,
    )
    train(model, optimizer, sparsifier, 0, 3)
    backward(model, 3)
    optimizer.step()
    layer = sparsifier.layers["4"]
    before, weight = layer.mask, layer.weight.detach().clone()
    momentum = optimizer.state[layer.weight]["momentum_buffer"].clone()
    assert sparsifier.step()
    again, new = before & layer.mask, layer.mask & ~before
    assert again.any()
    assert new.any()
    state = optimizer.state[layer.weight]["momentum_buffer"]
    assert not layer.weight[new].any()
    if regrown == "zero":
        assert not layer.weight[again].any()
        assert not state[layer.mask].any()
    else:
        assert torch.equal(layer.weight[again], weight[again])
        assert torch.equal(state[again], momentum[again])
    if regrown == "keep":
        assert not state[new].any()
    if regrown == "layer_mean":
        torch.testing.assert_close(state[new], momentum[again].mean().expand_as(state[new]))


@pytest.mark.parametrize("regrown", ["keep", "zero"])
def test_the_first_steps_of_a_regrown_weight_are_not_inflated_under_adam(regrown: str) -> None:
    """From a second moment of zero its first step would be 0.1 / sqrt(0.001), three times too long."""
    lr = 1e-3
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    sparsifier = RigL(
        model, optimizer, sparsity=0.8, total_steps=300, update_every=100, regrown=regrown
    )  # type: ignore[arg-type]
    train(model, optimizer, sparsifier, 0, 99)
    for state in optimizer.state.values():  # as after a long run, when the correction has worn off
        state["exp_avg_sq"] /= 1 - 0.999**99
        state["step"].fill_(10_000)
    before = masks(sparsifier)
    train(model, optimizer, sparsifier, 99, 100)
    grown = {name: layer.mask & ~before[name] for name, layer in sparsifier.layers.items()}
    weights = {name: layer.weight.detach().clone() for name, layer in sparsifier.layers.items()}
    train(model, optimizer, sparsifier, 100, 101)
    steps = torch.cat(
        [
            (layer.weight - weights[name])[grown[name]].abs() / lr
            for name, layer in sparsifier.layers.items()
        ]
    )
    assert len(steps) > 5
    assert steps.median() < 1
    assert steps.max() < 2


# --- copies that follow ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ema", "swa", "ema-buffers"])
def test_averages_of_the_weights_follow_the_masks(kind: str) -> None:
    model = network()
    optimizer = sgd(model)
    sparsifier = GraNet(model, optimizer, initial_sparsity=0.5, **SETTINGS)
    average = {
        "ema": lambda: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
        "swa": lambda: AveragedModel(model),
        "ema-buffers": lambda: AveragedModel(
            model, avg_fn=lambda old, new, _: old.lerp(new, 0.5) if old.is_floating_point() else new,
            use_buffers=True,
        ),
    }[kind]()  # fmt: skip
    sparsifier.follow(average)
    for step in range(STEPS):
        train(model, optimizer, sparsifier, step, step + 1)
        average.update_parameters(model)
        for name, layer in masked_layers(average).items():
            mask = sparsifier.layers[name.removeprefix("module.")].mask
            assert torch.equal(layer.mask, mask)
            assert not layer.weight[~mask].any()
    assert sum(int(m.weight.count_nonzero()) for m in masked_layers(average).values()) <= (
        sparsifier.target_active
    )
    with pytest.raises(ValueError, match="model: expected a copy with the masked layers 0, 4, 5"):
        sparsifier.follow(sparsify(nn.Linear(3, 3)))


def test_averages_of_the_optimizers_step_follow_the_masks() -> None:
    """Through updates that drop and regrow: as torch averages beside it, and zero where a mask is."""
    model = network()
    optimizer = MaskedSGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    sparsifier = GraNet(model, optimizer, initial_sparsity=0.5, **SETTINGS)
    average = copy.deepcopy(model)
    optimizer.average_into(average.parameters(), decay=0.9)
    sparsifier.follow(average)
    expected = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    expected.update_parameters(model)  # the first time it is a copy
    updates = 0
    for step in range(STEPS):
        before = masks(sparsifier)
        backward(model, step)
        optimizer.step()
        expected.update_parameters(model)
        sparsifier.step()
        optimizer.zero_grad()
        updates += not same_masks(before, masks(sparsifier))
        for name, layer in masked_layers(average).items():
            mask = sparsifier.layers[name].mask
            assert torch.equal(layer.mask, mask)
            assert not layer.weight[~mask].any()
            with torch.no_grad():  # a regrown weight's average starts from zero
                expected.module.get_parameter(f"{name}.weight")[~(mask & before[name])] = 0.0
        for mine, theirs in zip(average.parameters(), expected.module.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)
    assert updates > 1
