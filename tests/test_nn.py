"""MaskedConv2d and MaskedLinear: how they are made, what their masks do, what they refuse."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from granet_kernels import MaskedConv2d, MaskedLinear, attached_mask
from tests.helpers import EXACT, FP64, NAN, bits
from tests.sample_layers import (
    DENSE,
    INPUTS,
    LAYERS,
    assert_same_results,
    conv,
    dense_twin,
    kind,
    linear,
    random_mask,
    sparse,
)

__all__ = ["kind"]


# ---- construction --------------------------------------------------------------------------------


def test_new_layers_are_dense_and_draw_the_same_weights(kind):
    dense_class = LAYERS[kind]().dense_type
    args = {"conv": (4, 6, (3, 2)), "linear": (5, 7)}[kind]
    torch.manual_seed(0)
    theirs = dense_class(*args)
    torch.manual_seed(0)
    ours = DENSE[dense_class](*args)
    assert isinstance(ours, dense_class)
    assert_close(ours.weight, theirs.weight, **EXACT)
    assert ours.sparsity == 0.0
    assert list(ours.state_dict()) == ["weight", "bias", "packed_mask"]
    assert ours.dense_grad.dtype == torch.bool
    assert not ours.dense_grad


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_factory_arguments(kind, device, dtype):
    layer = LAYERS[kind](device=device, dtype=dtype)
    assert layer.weight.dtype == dtype
    assert layer.packed_mask.dtype == torch.uint8
    assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {device}


def test_repr():
    layer = MaskedLinear(4, 2)
    layer.mask = torch.tensor([[True] * 4, [False] * 4])
    assert repr(layer) == "MaskedLinear(in_features=4, out_features=2, bias=True, sparsity=0.5000)"
    assert repr(MaskedConv2d(2, 4, 3, bias=False)) == (
        "MaskedConv2d(2, 4, kernel_size=(3, 3), stride=(1, 1), bias=False, sparsity=0.0000)"
    )
    assert repr(MaskedLinear(2, 1, device="meta")).endswith("sparsity=?)")


def test_reset_parameters_makes_all_weights_active(kind):
    layer = sparse(kind)
    layer.dense_grad.fill_(True)
    layer.reset_parameters()
    assert layer.sparsity == 0.0
    assert layer.weight.data.ne(0).all()
    assert not layer.dense_grad


def test_from_dense_shares_parameters_and_hooks_and_leaves_the_source_alone(kind):
    source = LAYERS[kind]().to_dense()
    calls = []
    source.register_forward_hook(lambda *_: calls.append("hook"))
    source.note = "kept"
    before = dict(source.__dict__)
    keys = list(source.state_dict())
    masked = DENSE[type(source)].from_dense(source)
    assert type(masked) is DENSE[type(source)]
    assert masked.weight is source.weight
    assert masked.bias is source.bias
    assert masked.note == "kept"
    masked(torch.zeros(INPUTS[kind]))
    assert calls == ["hook"]
    assert type(source) is masked.dense_type
    assert source.__dict__ == before
    assert list(source.state_dict()) == keys
    assert "dense_grad" not in source._non_persistent_buffers_set


def test_from_dense_refuses_other_layers():
    class Mine(nn.Linear):
        pass

    for layer in (nn.Conv2d(1, 1, 1), Mine(2, 2), MaskedLinear(2, 2), nn.Conv1d(1, 1, 1)):
        expected = rf"layer: expected torch\.nn\.Linear, not a subclass.*{type(layer).__name__}"
        with pytest.raises(TypeError, match=expected):
            MaskedLinear.from_dense(layer)


def test_to_dense_is_a_copy_without_a_mask(kind):
    layer = sparse(kind)
    layer.weight.data.masked_fill_(~layer.mask, 7.0)  # as a foreign optimizer would
    dense = layer.to_dense()
    assert type(dense) is layer.dense_type
    assert list(dense.state_dict()) == ["weight", "bias"]
    assert [*dense.buffers()] == []
    assert not dense.weight.data[~layer.mask].any()
    assert_close(dense.weight.data[layer.mask], layer.weight.data[layer.mask], **EXACT)
    assert attached_mask(dense.weight) is None
    assert layer.count_active() == int(layer.mask.sum())
    assert attached_mask(layer.weight) is layer.packed_mask
    assert dense.weight.data_ptr() != layer.weight.data_ptr()
    input = torch.randn(INPUTS[kind])
    layer.algorithm = "dense"
    assert_close(dense(input), layer(input), **EXACT)
    assert type(LAYERS[kind]().dense_type) is type(nn.Linear)


# ---- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0], ids=["empty", "some", "full"])
@pytest.mark.parametrize("foreign", [False, True], ids=["zeroed", "foreign"])
def test_the_output_is_that_of_weight_times_mask(kind, density, foreign):
    """Also where an optimizer that knows no masks wrote NaN into inactive weights."""
    ours = LAYERS[kind](dtype=torch.float64)
    mask = torch.rand(ours.weight.shape) < density
    ours.mask = mask
    theirs = dense_twin(ours)
    if foreign:
        ours.weight.data.masked_fill_(~mask, NAN)
    input = torch.randn(INPUTS[kind], dtype=torch.float64)
    assert_same_results(ours, theirs, input, mask=mask, **FP64)
    assert bits(ours.weight.grad[~mask].float()) == [0] * int((~mask).sum())


def test_mask_setter_by_hand():
    layer = MaskedLinear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0, 3.0], [NAN, -0.0, 6.0]]))
    packed = layer.packed_mask
    layer.mask = torch.tensor([[True, False, True], [False, False, True]])
    assert layer.packed_mask is packed
    assert packed.tolist() == [0b10_0101, *[0] * 15]
    assert bits(layer.weight) == bits([1.0, 0.0, 3.0, 0.0, 0.0, 6.0])
    assert layer.count_active() == 3
    assert layer.sparsity == 0.5
    layer.mask[0, 1] = True  # of a copy
    assert layer.count_active() == 3


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (torch.ones(7, 4, dtype=torch.bool), r"torch\.bool \(7, 4\)"),
        (torch.ones(5, 7, dtype=torch.bool), r"torch\.bool \(5, 7\)"),
        (torch.ones(7, 5), r"torch\.float32 \(7, 5\)"),
        (torch.ones(7, 5, dtype=torch.uint8), r"torch\.uint8 \(7, 5\)"),
        ([[True] * 5] * 7, "list"),
        (None, "NoneType"),
    ],
    ids=["wrong-shape", "transposed", "float", "uint8", "list", "none"],
)
def test_mask_setter_refuses(mask, got):
    layer = sparse("linear")
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(
        ValueError, match=rf"mask: expected a bool tensor of shape \(7, 5\), got {got}"
    ):
        layer.mask = mask
    assert_close(layer.state_dict(), before, **EXACT)


def test_mask_setter_takes_any_strides(kind):
    layer = LAYERS[kind]()
    mask = random_mask(layer)
    layer.mask = mask.movedim(0, -1).contiguous().movedim(-1, 0)
    assert torch.equal(layer.mask, mask)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 6, 5), r"input: expected 4 channels, got float32 \(2, 3, 6, 5\)"),
        ((2, 4, 2, 5), "input: expected a padded image no smaller than the dilated kernel"),
        ((2, 4), "input: expected 3 or 4 dimensions"),
        ((1, 2, 4, 6, 5), "input: expected 3 or 4 dimensions"),
    ],
    ids=["channels", "too-small", "2-D", "5-D"],
)
def test_conv_names_what_is_wrong_with_its_input(shape, message):
    with pytest.raises(ValueError, match=message):
        conv()(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(3, 4), (4,), (5, 3), ()], ids=str)
def test_linear_names_what_is_wrong_with_its_input(shape):
    with pytest.raises(ValueError, match="input: expected 5 features in the last dimension, got"):
        linear()(torch.zeros(shape))


def test_dtypes_that_do_not_fit_are_refused(kind):
    with pytest.raises(ValueError, match=r"input: expected torch\.float32 .*, got torch\.float64"):
        LAYERS[kind]()(torch.zeros(INPUTS[kind], dtype=torch.float64))


@pytest.mark.parametrize(
    "args", [(3, 4, 3, 1, 0, 1, 2), (4, 4, 3, 2, "same"), (4, 4, 3, 1, "half"), (4, 4, 3, 0)]
)
def test_constructor_refuses_what_the_parent_refuses(args):
    for layer in (nn.Conv2d, MaskedConv2d):
        with pytest.raises((ValueError, RuntimeError)):
            layer(*args)(torch.zeros(1, args[0], 5, 5))


@pytest.mark.parametrize(
    "layer", [MaskedConv2d(3, 4, 3), MaskedLinear(8, 4)], ids=["conv", "linear"]
)
def test_a_bias_elsewhere_is_refused(layer):
    layer.bias = torch.nn.Parameter(torch.zeros(4, device="meta"))
    with pytest.raises(ValueError, match="bias: expected a tensor on cpu as weight, got meta"):
        layer(torch.randn(2, 3, 8, 8))
