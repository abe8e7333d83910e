"""A masked layer's life: weight and mask stay together when copied, moved, cast, tied, replaced."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.testing import assert_close

from granet_kernels import MaskedConv2d, MaskedLinear, MaskedSGD, attached_mask
from tests.helpers import CHANNELS_LAST, EXACT
from tests.sample_layers import INPUTS, LAYERS, dense_twin, kind, random_mask, sparse

__all__ = ["kind"]


# ---- copies, moves, casts ------------------------------------------------------------------------


def saved_and_loaded(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": saved_and_loaded,
}


@pytest.fixture(params=COPIES)
def copied(request):
    return COPIES[request.param]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
def test_copies_are_equal_and_apart(kind, copied, memory_format):
    layer = sparse(kind).to(memory_format=memory_format)
    mask = layer.mask
    twin = copied(layer)
    assert torch.equal(twin.mask, mask)
    assert attached_mask(twin.weight) is twin.packed_mask
    input = torch.randn(INPUTS[kind])
    assert_close(twin(input), layer(input), **EXACT)
    twin.mask = torch.zeros_like(mask)
    assert torch.equal(layer.mask, mask)
    assert attached_mask(layer.weight) is layer.packed_mask


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "type": lambda m: m.type(torch.float64),
    "to": lambda m: m.to(torch.bfloat16),
    "to-channels-last": lambda m: m.to(torch.float64, memory_format=CHANNELS_LAST),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_keep_the_mask(kind, cast):
    layer = sparse(kind)
    mask, weight = layer.mask, layer.weight.detach().clone()
    layer.dense_grad.fill_(True)
    CASTS[cast](layer)
    assert layer.weight.dtype in (torch.float16, torch.bfloat16, torch.float64)
    assert layer.packed_mask.dtype == torch.uint8
    assert layer.dense_grad.dtype == torch.bool
    assert layer.dense_grad
    assert torch.equal(layer.mask, mask)
    assert attached_mask(layer.weight) is layer.packed_mask
    assert_close(layer.weight.data, weight.to(layer.weight.dtype), **EXACT)
    layer(torch.randn(INPUTS[kind]).to(layer.weight.dtype)).sum().backward()


@pytest.mark.parametrize("groups", [1, 2, 4], ids=lambda g: f"groups={g}")
@pytest.mark.parametrize("kernel", [1, (3, 2)], ids=["1x1", "3x2"])
def test_the_mask_follows_channels_last_and_back(groups, kernel):
    layer = MaskedConv2d(4, 8, kernel, groups=groups)
    layer.mask = random_mask(layer)
    mask, packed, weight = layer.mask, layer.packed_mask.clone(), layer.weight.detach().clone()
    input = torch.randn(2, 4, 6, 5)
    output = layer(input)
    layer.to(memory_format=CHANNELS_LAST)
    assert layer.weight.is_contiguous(memory_format=CHANNELS_LAST)
    assert torch.equal(layer.mask, mask)
    assert_close(layer(input), output)
    layer.to(memory_format=CHANNELS_LAST)
    assert torch.equal(layer.mask, mask)
    layer.to(memory_format=torch.contiguous_format)
    assert torch.equal(layer.packed_mask, packed)
    assert_close(layer.weight.data, weight, **EXACT)


def test_the_packed_mask_stays_the_same_tensor_where_nothing_moves(kind):
    layer = sparse(kind)
    packed = layer.packed_mask
    layer.double().to("cpu").to(memory_format=CHANNELS_LAST).float()
    layer.mask = random_mask(layer, seed=2)
    layer.load_state_dict(layer.state_dict())
    assert layer.packed_mask is packed


def test_share_memory(kind):
    layer = sparse(kind).share_memory()
    assert layer.packed_mask.is_shared()
    assert attached_mask(layer.weight) is layer.packed_mask


@pytest.mark.parametrize("change", ["utility", "data"])
def test_the_mask_follows_a_layout_that_changed_behind_its_back(change):
    layer = MaskedConv2d(4, 8, 3)
    layer.mask = torch.rand(8, 4, 3, 3) < 0.3
    mask, weight = layer.mask, layer.weight.detach().clone()
    x = torch.randn(2, 4, 6, 6)
    expected = layer(x)
    if change == "utility":
        torch.nn.utils.convert_conv2d_weight_memory_format(layer, torch.channels_last)
    else:
        layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x), expected)
    assert torch.equal(layer.mask, mask)
    optimizer = MaskedSGD(layer.parameters(), lr=0.0)
    layer(x).sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight, weight)


# ---- weights: tied, assigned, replaced -----------------------------------------------------------


def tied():
    """Two layers of one weight, and a mask that came through the first."""
    model = nn.ModuleList([MaskedLinear(4, 4), nn.Linear(4, 4)])
    model[1].weight = model[0].weight
    model[1] = MaskedLinear.from_dense(model[1])
    model[0].mask = torch.rand(4, 4) < 0.5
    return model


def assert_tied(model):
    first, second = model
    assert first.weight is second.weight
    assert first.packed_mask is second.packed_mask
    assert attached_mask(first.weight) is first.packed_mask
    first.mask = first.mask.roll(1)
    assert torch.equal(second.mask, first.mask)
    assert not second.weight.data[~second.mask].any()


@pytest.mark.parametrize(
    "life",
    [
        lambda model: model,
        copy.deepcopy,
        saved_and_loaded,
        lambda model: model.double(),
        lambda model: model.type(torch.float64),
        lambda model: model.to(memory_format=CHANNELS_LAST),
    ],
    ids=["as-made", "deepcopy", "torch.save", "double", "type", "channels-last"],
)
def test_tied_weights_share_one_mask(life):
    model = tied()
    mask = model[0].mask
    model = life(model)
    assert torch.equal(model[1].mask, mask)
    assert model[1].packed_mask.dtype == torch.uint8
    assert model[1].dense_grad.dtype == torch.bool
    assert_tied(model)


def test_tied_convolutions_follow_channels_last_once():
    first, second = sparse("conv"), nn.Conv2d(4, 6, (3, 2))
    second.weight = first.weight
    model = nn.ModuleList([first, MaskedConv2d.from_dense(second)])
    mask = first.mask
    model.to(memory_format=CHANNELS_LAST)
    assert torch.equal(first.mask, mask)
    assert_tied(model)
    model.to(memory_format=torch.contiguous_format)
    assert_tied(model)


def test_tying_masked_layers_by_assignment():
    first, second = sparse("linear"), sparse("linear")
    second.weight = first.weight
    assert_tied([first, second])


def test_untying_separates_the_masks():
    first, second = tied()
    mask = first.mask
    second.weight = nn.Parameter(first.weight.detach().clone())
    second.mask = torch.zeros_like(mask)
    assert torch.equal(first.mask, mask)
    assert attached_mask(first.weight) is first.packed_mask
    assert attached_mask(second.weight) is second.packed_mask


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
def test_an_assigned_weight_takes_over_the_mask(kind, memory_format):
    layer = sparse(kind)
    mask = layer.mask
    new = torch.randn(layer.weight.shape)
    if kind == "conv":
        new = new.to(memory_format=memory_format)
    layer.weight = nn.Parameter(new)
    assert attached_mask(layer.weight) is layer.packed_mask
    assert torch.equal(layer.mask, mask)
    input = torch.randn(INPUTS[kind])
    assert_close(layer(input), dense_twin(layer)(input))


def test_an_assigned_weight_of_another_shape_starts_active():
    layer = sparse("linear")
    layer.weight = nn.Parameter(torch.randn(20, 30))
    assert layer.mask.shape == (20, 30)
    assert layer.sparsity == 0.0


def test_functional_call_takes_weight_and_mask_from_outside(kind):
    layer, other = sparse(kind), LAYERS[kind]()
    other.mask = random_mask(other, seed=5)
    input = torch.randn(INPUTS[kind])
    before = attached_mask(layer.weight)
    output = functional_call(layer, dict(other.state_dict()), input)
    assert_close(output, other(input), **EXACT)
    assert attached_mask(layer.weight) is before is layer.packed_mask


def test_a_parametrized_weight_is_masked_too():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer = sparse("linear")
    mask, weight = layer.mask, layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", Double())
    input = torch.randn(3, 5)
    assert_close(layer(input), F.linear(input, 2 * weight * mask, layer.bias))
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is MaskedLinear
    assert torch.equal(layer.mask, mask)
    assert attached_mask(layer.weight) is layer.packed_mask


def test_hooks_run(kind):
    layer, calls = sparse(kind), []
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    layer.weight.register_post_accumulate_grad_hook(lambda *_: calls.append("weight"))
    layer(torch.randn(INPUTS[kind], requires_grad=True)).sum().backward()
    assert calls[:2] == ["pre", "forward"]
    assert sorted(calls[2:]) == ["backward", "weight"]
