"""An update in one call of an operator: what a run becomes is that of a prune and then an exchange."""

import pytest
import torch

from granet import GraNet, topology
from granet.topology import Topology
from granet_kernels import unpack_mask, use_backend
from tests.test_engine import (
    OPTIMIZERS,
    SETTINGS,
    assert_same,
    everything,
    network,
    reference_backend,
    train,
)

__all__ = ["reference_backend"]


def in_turn(self, k, fraction, scores, how, *, floors):
    self.prune(k, floor=floors[0])
    pruned = {name: layer.bitmask.packed.clone() for name, layer in self.layers.items()}
    self.exchange(fraction, scores, how, floor=floors[1])
    return pruned


@pytest.fixture
def calls(monkeypatch):
    """How often the operator was called."""
    count = []
    operator = topology.prune_drop_regrow_
    monkeypatch.setattr(
        topology,
        "prune_drop_regrow_",
        lambda *args, **kwargs: count.append(1) or operator(*args, **kwargs),
    )
    return count


def run(optimizer, freezes=False, memory_format=torch.contiguous_format, **settings):
    """Everything that a run makes, and what observers were told of its updates."""
    model = network(memory_format)
    model[3].weight.requires_grad_(not freezes)
    made = OPTIMIZERS[optimizer](model)
    sparsifier = GraNet(model, made, **(SETTINGS | settings))
    told = []
    sparsifier.observers.append(told.append)
    train(model, made, sparsifier)
    state = everything(model, made, sparsifier)
    for change in told:
        for part in ("before", "pruned", "after"):
            for name, mask in getattr(change, part).items():
                state[f"{part} at {change.step}.{name}"] = mask
    return state


# Of the twelve updates of a run six prune; the last is none.
@pytest.mark.parametrize(
    ("settings", "at_once"),
    [
        ({}, 6),
        ({"scope": "layer"}, 6),
        ({"initial_sparsity": 0.0}, 6),
        ({"memory_format": torch.channels_last}, 6),
        ({"grow": "momentum"}, 6),
        ({"grow": "random"}, 6),
        ({"sparsity": 0.5, "freezes": True}, 0),
        ({"regrown": "zero"}, 0),
        ({"regrown": "layer_mean"}, 0),
        ({"redistribution": "magnitude", "official_rounding": True}, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", ["MaskedSGD", "AdamW"])
def test_a_run_is_that_of_two_calls(optimizer, settings, at_once, calls, monkeypatch):
    """For any optimizer: also states of weights that were pruned and regrew in one update."""
    ours = run(optimizer, **settings)
    assert len(calls) == at_once
    monkeypatch.setattr(Topology, "prune_and_exchange", in_turn)
    assert_same(ours, run(optimizer, **settings))
    assert len(calls) == at_once


@pytest.mark.parametrize("optimizer", ["MaskedSGD", "AdamW"])
def test_a_run_is_the_same_on_the_default_backend(optimizer, calls, monkeypatch):
    with use_backend("auto"):
        ours = run(optimizer)
        assert len(calls) == 6
        monkeypatch.setattr(Topology, "prune_and_exchange", in_turn)
        assert_same(ours, run(optimizer))


def test_pruned_and_regrown_in_one_update_starts_anew():
    """Its value and first moment from zero, its second moment from the mean of those that stayed."""
    model = network()
    optimizer = OPTIMIZERS["AdamW"](model)
    sparsifier = GraNet(model, optimizer, **SETTINGS)
    train(model, optimizer, sparsifier, stop=4)
    before = {name: layer.mask for name, layer in sparsifier.layers.items()}
    # The smaller the weight the larger the score: what is pruned regrows.
    scores = {name: -layer.weight.detach().abs() for name, layer in sparsifier.layers.items()}
    scores = {name: (score - score.min() + 1) * before[name] for name, score in scores.items()}
    with torch.no_grad():
        pruned = sparsifier.topology.prune_and_exchange(
            sparsifier.numel // 4, 0.5, scores, sparsifier.plan.exchange, floors=(1, 1)
        )
    for name, layer in sparsifier.layers.items():
        left = unpack_mask(pruned[name], layer.weight.shape)
        again = before[name] & ~left & layer.mask
        stayed = left & layer.mask
        assert again.any()
        assert stayed.any()
        state = optimizer.state[layer.weight]
        assert not layer.weight[again].any()
        assert not state["exp_avg"][again].any()
        mean = state["exp_avg_sq"][stayed].double().mean().float()
        found = state["exp_avg_sq"][again]
        torch.testing.assert_close(found, mean.expand_as(found), rtol=1e-6, atol=0)
