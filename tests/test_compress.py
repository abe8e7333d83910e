"""CompressedConv2d and CompressedLinear: the same outputs from the non-zeros alone."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from granet_kernels import (
    CompressedConv2d,
    CompressedLinear,
    MaskedConv2d,
    MaskedLinear,
    compress,
    pack_mask,
)
from tests.compressing import outputs, randomise
from tests.helpers import CHANNELS_LAST, EXACT, FP64, NAN, bits, mask_of

ops = torch.ops.granet


# ---- the operators -------------------------------------------------------------------------------


def packed(*ones_and_zeros):
    return pack_mask(mask_of(*ones_and_zeros))


def test_linear_by_hand():
    """The weight is [[0, 2, 0], [-1, 0, 3]]."""
    args = torch.tensor([[1.0, 10.0, 100.0]]), torch.tensor([2.0, -1.0, 3.0])
    mask, bias = packed(0, 1, 0, 1, 0, 1), torch.tensor([-30.0, 1.0])
    assert ops.compressed_linear(*args, mask, None, [2, 3], False).tolist() == [[20, 299]]
    assert ops.compressed_linear(*args, mask, bias, [2, 3], False).tolist() == [[-10, 300]]
    relu = ops.compressed_linear(*args, mask, bias, [2, 3], True)
    assert bits(relu) == bits([0.0, 300.0])


def test_conv2d_by_hand():
    """Two 1 x 2 filters, [[2, 0]] and [[0, -1]], over one row."""
    input, values = torch.tensor([[[[1.0, 2.0, 5.0]]]]), torch.tensor([2.0, -1.0])
    rest = [2, 1, 1, 2], [1, 1], [0, 0], [1, 1], 1
    mask, bias = packed(1, 0, 0, 1), torch.tensor([0.0, 4.0])
    plain = ops.compressed_conv2d(input, values, mask, None, None, *rest, False)
    assert plain.tolist() == [[[[2, 4]], [[-2, -5]]]]
    residual = torch.tensor([[[[-9.0, 1.0]], [[1.0, 0.0]]]])
    fused = ops.compressed_conv2d(input, values, mask, bias, residual, *rest, True)
    assert fused.tolist() == [[[[0, 5]], [[3, 0]]]]


def test_sums_are_rounded_once():
    """1 + 2^-9 - 1: bf16 would lose the middle term if the sum were rounded before the residual."""
    input = torch.tensor([[[[1.0]], [[2.0**-9]]]], dtype=torch.bfloat16)
    geometry = [1, 2, 1, 1], [1, 1], [0, 0], [1, 1], 1
    residual = torch.full((1, 1, 1, 1), -1.0, dtype=torch.bfloat16)
    values = torch.ones(2, dtype=torch.bfloat16)
    output = ops.compressed_conv2d(input, values, packed(1, 1), None, residual, *geometry, False)
    assert output.dtype == torch.bfloat16
    assert output.item() == 2.0**-9


LINEAR = {
    "input": torch.zeros(2, 3),
    "values": torch.zeros(2),
    "mask": packed(0, 1, 0, 1, 0, 0),
    "bias": None,
    "weight_shape": [2, 3],
    "relu": False,
}
CONV = {
    "input": torch.zeros(1, 1, 3, 3),
    "values": torch.zeros(2),
    "mask": packed(0, 1, 0, 1),
    "bias": None,
    "residual": None,
    "weight_shape": [1, 1, 2, 2],
    "stride": [1, 1],
    "padding": [0, 0],
    "dilation": [1, 1],
    "groups": 1,
    "relu": False,
}


@pytest.mark.parametrize(
    ("valid", "changed", "message"),
    [
        (LINEAR, {"values": torch.zeros(3)}, r"values: expected 2 elements.*active bit.*got 3"),
        (LINEAR, {"values": torch.zeros(1, 2)}, r"values: expected a contiguous 1-D .* at most 6"),
        (LINEAR, {"values": torch.zeros(2).int()}, r"values: expected a float32"),
        (LINEAR, {"mask": torch.zeros(15).byte()}, r"mask: expected uint8 \(16,\).* of \(2, 3\) w"),
        (LINEAR, {"mask": torch.zeros(16)}, r"mask: expected uint8 \(16,\).*got float32"),
        (LINEAR, {"mask": packed(0, 0, 0, 0, 0, 1, 1)}, r"mask: expected zero bits behind the las"),
        (LINEAR, {"bias": torch.zeros(3)}, r"bias: expected shape \(2,\)"),
        (LINEAR, {"input": torch.zeros(2, 4)}, r"input: expected 3 features"),
        (CONV, {"values": torch.zeros(1)}, r"values: expected 2 elements"),
        (CONV, {"weight_shape": [1, 1, 2]}, r"weight_shape|SymInt"),
        (CONV, {"input": torch.zeros(1, 2, 3, 3)}, r"input: expected 1 channels"),
        (CONV, {"residual": torch.zeros(1, 1, 3, 3)}, r"residual: expected float32 \(1, 1, 2, 2\)"),
        (
            CONV,
            {"residual": torch.zeros(1, 1, 2, 2).half()},
            r"residual: expected float32 .*float16",
        ),
        (CONV, {"dilation": [3, 1]}, r"input: expected a padded image no smaller"),
        (CONV, {"groups": 2}, r"groups: expected a divisor of the 1 output"),
        (CONV, {"stride": [0, 1]}, r"stride: expected two integers of at least 1"),
    ],
)
def test_errors(valid, changed, message):
    operator = ops.compressed_linear if valid is LINEAR else ops.compressed_conv2d
    operator(**valid)
    with pytest.raises((ValueError, RuntimeError), match=message):
        operator(**(valid | changed))


def test_a_mask_that_changed_is_counted_again():
    mask = packed(1, 1, 0, 0, 0, 0)
    operator = ops.compressed_linear
    operator(**(LINEAR | {"mask": mask}))
    mask.copy_(packed(1, 1, 1, 0, 0, 0))
    with pytest.raises(ValueError, match="values: expected 3 elements"):
        operator(**(LINEAR | {"mask": mask}))


# ---- the layers ----------------------------------------------------------------------------------

GEOMETRIES = {
    "plain": {},
    "stride-padding": {"stride": 2, "padding": (2, 1)},
    "dilation": {"dilation": (2, 1), "padding": 2},
    "groups": {"groups": 2, "bias": False},
    "depthwise": {"groups": 4, "out_channels": 8},
    "valid": {"padding": "valid"},
    "same": {"padding": "same"},
    "same-odd": {"padding": "same", "kernel_size": (2, 4), "dilation": 1},
    "reflect": {"padding": (2, 1), "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate", "stride": 2},
    "circular-same": {"padding": "same", "padding_mode": "circular"},
    "reflect-none": {"padding_mode": "reflect"},
}


def conv(**options):
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": (3, 2)} | options
    layer = MaskedConv2d(**options).double()
    layer.mask = torch.rand(layer.weight.shape) < 0.4
    return layer


@pytest.mark.parametrize("size", [(2, 4, 7, 6), (1, 4, 7, 6), (0, 4, 7, 6), (4, 7, 6)], ids=str)
@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES)
def test_conv_equals_the_masked_layer(options, size):
    layer = conv(**options)
    input = torch.randn(size, dtype=torch.float64)
    compressed = CompressedConv2d.from_masked(layer)
    assert compressed.values.numel() == layer.count_active()
    assert_close(outputs(compressed, input), outputs(layer, input), **FP64)
    if len(size) == 4:
        input = input.contiguous(memory_format=CHANNELS_LAST)
        result = outputs(compressed, input)
        assert result.stride() == outputs(layer, input).stride()
        assert_close(result, outputs(layer, input), **FP64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(3, 5), (2, 3, 5), (5,), (0, 5)], ids=str)
def test_linear_equals_the_masked_layer(size, bias):
    layer = MaskedLinear(5, 7, bias=bias).double()
    layer.mask = torch.rand(7, 5) < 0.4
    input = torch.randn(size, dtype=torch.float64)
    expected = outputs(layer, input)
    assert_close(outputs(CompressedLinear.from_masked(layer), input), expected, **FP64)
    fused = CompressedLinear.from_masked(layer, relu=True)
    assert_close(outputs(fused, input), expected.relu(), **FP64)


def test_order_does_not_depend_on_the_memory_format():
    layer = conv()
    twin = copy.deepcopy(layer).to(memory_format=CHANNELS_LAST)
    one, other = CompressedConv2d.from_masked(layer), CompressedConv2d.from_masked(twin)
    assert torch.equal(one.values, other.values)
    assert torch.equal(one.packed_mask, other.packed_mask)


def test_holds_only_nonzeros_and_what_they_need():
    layer = MaskedConv2d(4, 6, (3, 2)).double()
    layer.mask = torch.arange(144).view(6, 4, 3, 2) % 3 == 0
    with torch.no_grad():
        layer.weight[1, 2, 0, 0] = 0.0  # active, and zero: dropped
        layer.weight[0, 0, 0, 0] = NAN  # a broken model shows
    compressed = CompressedConv2d.from_masked(layer)
    assert compressed.count_active() == compressed.values.numel() == 47
    assert int(compressed.values.isnan().sum()) == 1
    held = {name: tuple(tensor.shape) for name, tensor in compressed.state_dict().items()}
    assert held == {"values": (47,), "packed_mask": (32,), "bias": (6,)}
    assert torch.equal(compressed.mask, layer.mask & (layer.weight != 0))
    assert_close(compressed.weight, layer.weight.detach(), equal_nan=True, **EXACT)
    assert compressed.sparsity == 1 - 47 / 144
    assert not any(param.requires_grad for param in compressed.parameters())


def test_shares_nothing_with_the_masked_layer():
    layer = conv()
    layer.mask = torch.ones_like(layer.mask)
    compressed, x = CompressedConv2d.from_masked(layer), torch.randn(1, 4, 3, 2).double()
    before = outputs(compressed, x)
    with torch.no_grad():
        layer.weight.add_(1)
        layer.bias.add_(1)
    layer.mask = torch.zeros_like(layer.mask)
    assert_close(outputs(compressed, x), before, **EXACT)


def test_folding_a_batch_norm():
    layer = conv()
    for affine in (True, False):
        bn = randomise(nn.BatchNorm2d(6, affine=affine).double()).eval()
        input = torch.randn(2, 4, 7, 6, dtype=torch.float64)
        expected = outputs(bn, outputs(layer, input))
        fused = CompressedConv2d.from_masked(layer, bn, relu=True)
        assert_close(outputs(fused, input), expected.relu(), **FP64)
        assert torch.equal(fused.mask, layer.mask)
    bn = nn.BatchNorm2d(6).double().eval()
    bn.weight.data[2] = 0.0
    assert not CompressedConv2d.from_masked(layer, bn).mask[2].any()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: CompressedConv2d.from_masked(nn.Conv2d(1, 1, 1)),
            TypeError,
            "layer: .*got Conv2d",
        ),
        (lambda: CompressedLinear.from_masked(conv()), TypeError, "layer: .*got MaskedConv2d"),
        (lambda: fold(nn.BatchNorm1d(6)), TypeError, "bn: expected a BatchNorm2d"),
        (lambda: fold(nn.BatchNorm2d(5)), ValueError, "bn: expected 6 channels, got 5"),
        (lambda: fold(nn.BatchNorm2d(6, track_running_stats=False)), ValueError, "bn: .*running"),
    ],
)
def test_refused_layers(make, error, message):
    with pytest.raises(error, match=message):
        make()


def fold(bn):
    return CompressedConv2d.from_masked(conv(), bn)


@pytest.mark.parametrize(
    "residual",
    [
        torch.randn(2, 6, 5, 5, dtype=torch.float64),
        torch.randn(2, 6, 5, 5, dtype=torch.float64).contiguous(memory_format=CHANNELS_LAST),
        torch.randn(6, 1, 1, dtype=torch.float64),  # broadcast to the output
        torch.randn(3, 2, 6, 5, 5, dtype=torch.float64),  # the output is broadcast to it
        torch.randn(2, 6, 5, 5),  # of another dtype
        -0.25,
    ],
    ids=["same", "channels-last", "channels", "five-dimensions", "fp32", "number"],
)
@pytest.mark.parametrize("relu", [False, True])
def test_residual_is_added_as_plus_would(residual, relu):
    layer = conv()
    compressed = CompressedConv2d.from_masked(layer, relu=relu)
    input = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    expected = outputs(layer, input) + residual
    result = outputs(compressed, input, residual)
    assert_close(result, expected.relu() if relu else expected, **FP64)


def test_an_empty_layer_gives_the_bias():
    layer = conv()
    layer.mask = torch.zeros_like(layer.mask)
    result = outputs(CompressedConv2d.from_masked(layer), torch.randn(1, 4, 3, 2).double())
    assert_close(result.flatten(), layer.bias.detach(), **EXACT)


def test_there_is_no_gradient():
    layer = CompressedLinear.from_masked(MaskedLinear(5, 7))
    input = torch.randn(2, 5)
    assert not layer(input).requires_grad
    with pytest.raises(RuntimeError, match="CompressedLinear is for inference and has no gradient"):
        layer(input.requires_grad_())
    with torch.no_grad():
        layer(input)
    with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        layer.requires_grad_()(input.detach())
    convolution = CompressedConv2d.from_masked(conv())
    with pytest.raises(RuntimeError, match="CompressedConv2d is for inference"):
        convolution(torch.randn(1, 4, 3, 2).double(), torch.ones(1, requires_grad=True))


def test_dtypes():
    """The output has the input's dtype; values of another are used as they are."""
    layer = conv().float()
    compressed = CompressedConv2d.from_masked(layer)
    input = torch.randn(2, 4, 7, 6)
    expected = outputs(layer, input)
    half = copy.deepcopy(compressed).bfloat16()
    before = half.values
    assert half.double().float().values is not before  # caches know a tensor by its identity
    half.bfloat16()
    assert {half.values.dtype, half.bias.dtype} == {torch.bfloat16}
    assert half.packed_mask.dtype == torch.uint8
    result = outputs(half, input.bfloat16())
    assert result.dtype == torch.bfloat16
    assert_close(result.float(), expected, rtol=2**-7, atol=2**-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert outputs(compressed, input).dtype == torch.bfloat16
    assert outputs(half, input).dtype == torch.float32
    doubled = copy.deepcopy(compressed).type(torch.float64)
    assert doubled.packed_mask.dtype == torch.uint8
    assert_close(outputs(doubled, input.double()).float(), expected, rtol=0, atol=1e-5)


def test_repr():
    layer = MaskedConv2d(4, 6, (3, 2), stride=2, padding=1).double()
    layer.mask = torch.arange(144).view(6, 4, 3, 2) < 18
    bn = nn.BatchNorm2d(6).double().eval()
    assert repr(CompressedConv2d.from_masked(layer, bn, relu=True, residual=True)) == (
        "CompressedConv2d(4, 6, kernel_size=(3, 2), stride=(2, 2), padding=(1, 1), bias=True, "
        "nonzeros=18/144, sparsity=0.8750, fused=bn+residual+relu)"
    )
    linear = MaskedLinear(4, 2, bias=False)
    linear.mask = torch.tensor([[True, False, False, False], [False] * 4])
    assert repr(CompressedLinear.from_masked(linear)) == (
        "CompressedLinear(4, 2, bias=False, nonzeros=1/8, sparsity=0.8750)"
    )


def test_copies_and_pickles():
    compressed = CompressedConv2d.from_masked(conv(), relu=True)
    input = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    expected = outputs(compressed, input)
    for twin in (copy.deepcopy(compressed), pickle.loads(pickle.dumps(compressed))):
        assert twin.values is not compressed.values
        assert_close(outputs(twin, input), expected, **EXACT)


def test_a_single_layer_is_a_model():
    assert isinstance(compress(conv()), CompressedConv2d)
    assert isinstance(compress(MaskedLinear(3, 4)), CompressedLinear)
