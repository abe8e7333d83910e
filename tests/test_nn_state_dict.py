"""Masked layers made on the meta device, saved and loaded."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from granet_kernels import attached_mask, pack_mask
from granet_kernels.layout import full_mask
from tests.helpers import CHANNELS_LAST, EXACT, bits
from tests.sample_layers import INPUTS, LAYERS, conv, kind, sparse

__all__ = ["kind"]


# ---- the meta device -----------------------------------------------------------------------------


@pytest.fixture
def poisoned_memory():
    """Uninitialised memory holds NaN and True instead of whatever lies there."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("then", ["reset_parameters", "load_state_dict"])
def test_from_meta_through_to_empty(kind, memory_format, then):
    layer = LAYERS[kind](device="meta").to(memory_format=memory_format).to_empty(device="cpu")
    source = sparse(kind)
    if then == "reset_parameters":
        layer.reset_parameters()
        assert layer.sparsity == 0.0
        assert layer.weight.data.isfinite().all()
    else:
        layer.load_state_dict(source.state_dict())
        assert torch.equal(layer.mask, source.mask)
    assert not layer.dense_grad
    assert attached_mask(layer.weight) is layer.packed_mask
    layer(torch.randn(INPUTS[kind])).sum().backward()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("dense", [False, True], ids=["masked-state", "dense-state"])
def test_from_meta_by_assigning(kind, memory_format, dense):
    source = sparse(kind).to(memory_format=memory_format)
    state = source.to_dense().state_dict() if dense else source.state_dict()
    layer = LAYERS[kind](device="meta")
    layer.load_state_dict(state, assign=True)
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.data_ptr() == state["weight"].data_ptr()
    assert layer.packed_mask.device.type == layer.dense_grad.device.type == "cpu"
    assert attached_mask(layer.weight) is layer.packed_mask
    assert not layer.dense_grad
    assert torch.equal(layer.mask, torch.ones_like(source.mask) if dense else source.mask)
    input = torch.randn(INPUTS[kind])
    assert_close(layer(input), source(input))


def test_assigning_a_state_of_another_memory_format():
    source, layer = sparse("conv"), conv().to(memory_format=CHANNELS_LAST)
    layer.load_state_dict(source.state_dict(), assign=True)
    assert layer.weight.is_contiguous()
    assert torch.equal(layer.mask, source.mask)


def test_forward_on_meta(kind):
    layer = LAYERS[kind](device="meta")
    output = layer(torch.empty(INPUTS[kind], device="meta"))
    assert output.shape == LAYERS[kind]()(torch.zeros(INPUTS[kind])).shape
    output.sum().backward()
    assert layer.weight.grad.is_meta


# ---- state_dict ----------------------------------------------------------------------------------


def test_the_saved_mask_is_in_row_major_order_whatever_the_memory_format():
    plain = sparse("conv")
    moved = copy.deepcopy(plain).to(memory_format=CHANNELS_LAST)
    assert not torch.equal(moved.packed_mask, plain.packed_mask)
    saved = moved.state_dict()["packed_mask"]
    assert torch.equal(saved, plain.state_dict()["packed_mask"])
    assert torch.equal(saved, pack_mask(plain.mask))
    assert saved.dtype == torch.uint8


@pytest.mark.parametrize("from_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("to_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
def test_round_trip_between_memory_formats(from_format, to_format):
    source = sparse("conv").to(memory_format=from_format)
    target = conv().to(memory_format=to_format)
    packed = target.packed_mask
    assert str(target.load_state_dict(source.state_dict())) == "<All keys matched successfully>"
    assert target.packed_mask is packed
    assert torch.equal(target.mask, source.mask)
    assert_close(target.weight, source.weight, **EXACT)


def test_a_dense_checkpoint_loads_strictly_and_activates_all(kind):
    layer = sparse(kind)
    state = LAYERS[kind]().to_dense().state_dict()
    layer.load_state_dict(state, strict=True)
    assert layer.sparsity == 0.0
    assert_close(layer.weight.data, state["weight"], **EXACT)


def test_loading_zeroes_inactive_weights(kind):
    layer, state = LAYERS[kind](), sparse(kind).state_dict()
    mask = sparse(kind).mask
    state["weight"] = torch.full_like(state["weight"], -1.0)
    layer.load_state_dict(state)
    assert bits(layer.weight) == bits(torch.where(mask, -1.0, 0.0))
    assert (state["weight"] == -1).all()


def test_loading_leaves_the_checkpoint_alone(kind):
    state = sparse(kind).state_dict()
    before = copy.deepcopy(state)
    layer = LAYERS[kind]()
    layer.load_state_dict(state)
    layer.mask = torch.zeros_like(layer.mask)
    assert_close(dict(state), dict(before), **EXACT)


WRONG_MASKS = {
    "wrong-length": (lambda packed: full_mask(1000), r"expected the mask of .* weights, uint8"),
    "wrong-dtype": (lambda packed: packed.float(), r"got torch\.float32"),
    "bool-mask": (lambda packed: torch.ones(7, 5, dtype=torch.bool), r"got torch\.bool"),
    "tail-bits": (lambda packed: torch.full_like(packed, 255), "zero bits behind the last"),
}


@pytest.mark.parametrize("wrong", WRONG_MASKS)
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
def test_a_wrong_mask_is_refused_and_nothing_changed(kind, wrong, strict):
    layer, state = sparse(kind), LAYERS[kind]().state_dict()
    change, message = WRONG_MASKS[wrong]
    state["packed_mask"] = change(state["packed_mask"])
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=f"packed_mask: .*{message}"):
        layer.load_state_dict(state, strict=strict)
    assert_close(dict(layer.state_dict()), dict(before), **EXACT)


@pytest.mark.parametrize("with_mask", [True, False], ids=["masked-state", "dense-state"])
def test_a_wrong_weight_is_refused_and_the_mask_unchanged(kind, with_mask):
    layer, state = sparse(kind), LAYERS[kind]().state_dict()
    mask, weight = layer.mask, layer.weight.detach().clone()
    state["weight"] = state["weight"][:1]
    if not with_mask:
        del state["packed_mask"]
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(state)
    assert torch.equal(layer.mask, mask)
    assert_close(layer.weight.data, weight, **EXACT)


def test_a_partial_checkpoint_keeps_the_mask(kind):
    layer = sparse(kind)
    mask = layer.mask
    missing = layer.load_state_dict({"bias": torch.ones_like(layer.bias)}, strict=False)
    assert missing.missing_keys == ["weight"]
    assert torch.equal(layer.mask, mask)
    assert layer.bias.eq(1).all()


def test_unexpected_keys_are_reported(kind):
    layer = LAYERS[kind]()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*\"dense_grad\""):
        layer.load_state_dict({**layer.state_dict(), "dense_grad": torch.zeros(())})


def test_a_state_dict_follows_later_changes_as_that_of_torch_does(kind):
    layer = sparse(kind)
    state = layer.state_dict(keep_vars=True)
    assert state["weight"] is layer.weight
    layer.mask = torch.zeros_like(layer.mask)
    assert not state["packed_mask"].any()
