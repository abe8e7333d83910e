"""MaskedSGD remembers who updates which parameters; whatever it follows from may change between steps."""

import copy

import pytest
import torch
from torch import nn

from granet_kernels import MaskedSGD, attach_mask, pack_mask, sparsify
from granet_kernels.bitmask import detach_mask


def network():
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)))
    for layer in (model[0], model[2]):
        layer.mask = torch.rand(layer.weight.shape) < 0.5
    return model


def set_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        parameter.grad = torch.empty_like(parameter).copy_(noise)


def masks_another_weight(model, optimizer):
    model[0].mask = ~model[0].mask


def changes_bits_in_place(model, optimizer):
    model[0].packed_mask.zero_()


def loses_a_gradient(model, optimizer):
    model[0].weight.grad = None
    model[1].bias.grad = None


def gets_another_momentum(model, optimizer):
    optimizer.state[model[0].weight]["momentum_buffer"] = torch.ones_like(model[0].weight)


def gets_another_state(model, optimizer):
    ones = torch.ones_like(model[2].weight)
    optimizer.state[model[2].weight] = {"momentum_buffer": ones}


def loses_its_state(model, optimizer):
    optimizer.state.clear()


def loads_a_state(model, optimizer):
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["momentum_buffer"] += 1
    optimizer.load_state_dict(state)


def moves_in_memory(model, optimizer):
    weight = model[0].weight
    weight.data = weight.data.to(memory_format=torch.channels_last)
    weight.grad = weight.grad.to(memory_format=torch.channels_last)


def replaces_a_parameter(model, optimizer):
    weight = nn.Parameter(model[2].weight.detach().clone())
    weight.grad = torch.ones_like(weight)
    optimizer.param_groups[0]["params"][4] = weight


def is_detached(model, optimizer):
    detach_mask(model[2].weight)


def loses_its_momentum(model, optimizer):
    optimizer.param_groups[0]["momentum"] = 0


def gets_more_parameters(model, optimizer):
    extra = nn.Parameter(torch.ones(3))
    extra.grad = torch.ones(3)
    model.register_parameter("extra", extra)
    optimizer.param_groups[0]["params"].append(extra)


def gets_another_group(model, optimizer):
    extra = nn.Parameter(torch.ones(3))
    extra.grad = torch.ones(3)
    model.register_parameter("extra", extra)
    optimizer.add_param_group({"params": [extra], "lr": 1.0})


def changes_its_dtype(model, optimizer):
    model.double()
    set_gradients(model, 3)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for entry in optimizer.state.values():
        entry["momentum_buffer"] = entry["momentum_buffer"].double()


def becomes_differentiable(model, optimizer):
    optimizer.param_groups[0]["differentiable"] = True
    optimizer.defaults["differentiable"] = False  # the group's updates, outside of autograd


def gets_other_averages(model, optimizer):
    optimizer.average_into([torch.ones_like(param) for param in model.parameters()], 0.5)


WITH_AVERAGES = (
    masks_another_weight,
    changes_bits_in_place,
    loses_a_gradient,
    gets_another_momentum,
    loses_its_state,
    loads_a_state,
    is_detached,
    loses_its_momentum,
    becomes_differentiable,
    gets_other_averages,
)
"""All others change what averages have to be like."""

CHANGES = (
    masks_another_weight,
    changes_bits_in_place,
    loses_a_gradient,
    gets_another_momentum,
    gets_another_state,
    loses_its_state,
    loads_a_state,
    moves_in_memory,
    replaces_a_parameter,
    is_detached,
    loses_its_momentum,
    gets_more_parameters,
    gets_another_group,
    changes_its_dtype,
    becomes_differentiable,
)


def outcome(change, forgets, averaged=False):
    """Two steps, the change, and one more: all parameters, momenta and averages."""
    model = network()
    optimizer = MaskedSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    if averaged:
        optimizer.average_into(copy.deepcopy(model).parameters(), 0.9)
    for step in range(2):
        set_gradients(model, step)
        optimizer.step()
    set_gradients(model, 2)
    change(model, optimizer)
    if forgets:
        optimizer._plans.clear()
    optimizer.step()
    momenta = [optimizer.momentum_of(parameter) for parameter in model.parameters()]
    averages = [tensor for tensors in optimizer._averages for tensor in tensors]
    return [*model.parameters(), *model.buffers(), *momenta, *averages]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_step_after_a_change_is_that_of_who_remembers_nothing(change):
    for ours, wanted in zip(outcome(change, False), outcome(change, True), strict=True):
        assert (ours is None) == (wanted is None)
        assert ours is None or torch.equal(ours, wanted)


@pytest.mark.parametrize("change", WITH_AVERAGES, ids=lambda change: change.__name__)
def test_averages_after_a_change_are_those_of_who_remembers_nothing(change):
    ours, wanted = (outcome(change, forgets, averaged=True) for forgets in (False, True))
    for a, b in zip(ours, wanted, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_weights_of_another_dtype_are_updated_apart():
    """Without momentum, whose buffers would tell."""
    weights = [nn.Parameter(torch.ones(16)) for _ in range(2)]
    for weight in weights:
        attach_mask(weight, pack_mask(torch.arange(16) < 8))
        weight.grad = torch.ones(16)
    optimizer = MaskedSGD(weights, lr=0.5)
    optimizer.step()
    weights[1].data = weights[1].data.double()
    weights[1].grad = torch.ones(16, dtype=torch.float64)
    optimizer.step()
    assert weights[0].tolist() == weights[1].tolist() == [0.0] * 16


def test_nothing_is_planned_anew_while_nothing_changes(monkeypatch):
    model = network()
    optimizer = MaskedSGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.average_into(copy.deepcopy(model).parameters())
    plans = []
    plan = MaskedSGD._plan
    monkeypatch.setattr(
        MaskedSGD, "_plan", lambda self, *args: plans.append(1) or plan(self, *args)
    )
    for step in range(5):
        set_gradients(model, step)
        optimizer.step()
    assert len(plans) == 2  # without momentum at first, and with it from then on


def test_a_mask_that_is_attached_later_is_heeded():
    weight = nn.Parameter(torch.ones(16))
    optimizer = MaskedSGD([weight], lr=1.0, momentum=0.9)
    weight.grad = torch.ones(16)
    optimizer.step()
    attach_mask(weight, pack_mask(torch.arange(16) < 3))
    optimizer.step()
    assert weight[3:].count_nonzero() == 0
    assert optimizer.momentum_of(weight)[3:].count_nonzero() == 0
