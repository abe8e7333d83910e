"""compress(), CompressedConv2d and CompressedLinear: the same outputs from the non-zeros alone."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.testing import assert_close

from granet_kernels import (
    CompressedConv2d,
    CompressedLinear,
    MaskedConv2d,
    MaskedLinear,
    compress,
    masked_layers,
    pack_mask,
    sparsify,
)
from tests.helpers import NAN, bits, mask_of

EXACT = {"rtol": 0, "atol": 0}
FP64 = {"rtol": 0, "atol": 1e-12}  # sums of some hundred products of numbers about 1
CHANNELS_LAST = torch.channels_last
ops = torch.ops.granet


def randomise(model, active=0.4):
    """Masks, and batch norms that do something."""
    for layer in masked_layers(model).values():
        layer.mask = torch.rand(layer.weight.shape) < active
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                for tensor in (module.weight, module.running_var):
                    if tensor is not None:
                        tensor.uniform_(0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    if tensor is not None:
                        tensor.normal_()
    return model


def sparse(model):
    return randomise(sparsify(model).double())


def outputs(model, *args):
    with torch.no_grad():
        return model(*[arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args])


def parts(model):
    """Names of the compressed layers, and what is fused into them."""
    layers = (CompressedConv2d, CompressedLinear)
    return {
        name: "+".join(module.fused)
        for name, module in model.named_modules()
        if isinstance(module, layers)
    }


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


# ---- saving and loading --------------------------------------------------------------------------


def small():
    return sparsify(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()))


def saved(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return file


def test_loads_into_a_model_of_other_masks():
    model, x = randomise(small()), torch.randn(2, 3, 5, 5)
    compressed = compress(model)
    state = torch.load(saved(compressed), weights_only=True)
    for active in (0.1, 1.0):
        other = compress(randomise(small(), active))
        layer = other.get_submodule("0")
        before, mask_before = layer.values, layer.packed_mask
        assert before.numel() != compressed.get_submodule("0").values.numel()
        assert str(other.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
        assert layer.values is not before  # caches know a tensor by its identity
        assert layer.packed_mask is not mask_before
        assert_close(outputs(other, x), outputs(compressed, x), **EXACT)
        assert not layer.values.requires_grad


def test_loads_onto_meta():
    compressed, x = compress(randomise(small())), torch.randn(2, 3, 5, 5)
    with torch.device("meta"):
        other = compress(small())
    assert other(x.to("meta")).shape == (2, 72)
    other.load_state_dict(torch.load(saved(compressed)), assign=True)
    assert_close(outputs(other, x), outputs(compressed, x), **EXACT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("0.values"), "0: expected packed_mask and values, got one"),
        (lambda state: state.pop("0.packed_mask"), "0: expected packed_mask and values, got one"),
        (lambda s: s.update({"0.values": s["0.values"][1:]}), "0: values: expected .* active bit"),
        (lambda s: s.update({"0.packed_mask": torch.zeros(16).byte()}), "expected the mask of"),
        (lambda state: state.update({"0.weight": torch.ones(1)}), "Unexpected key.*0.weight"),
    ],
)
def test_damaged_files_are_refused(change, message):
    compressed = compress(randomise(small()))
    state = compressed.state_dict()
    expected = {name: tensor.clone() for name, tensor in state.items()}
    change(state)
    with pytest.raises(RuntimeError, match=message):
        compressed.load_state_dict(state)
    for name, tensor in compressed.state_dict().items():
        assert_close(tensor, expected[name], **EXACT)


def test_a_file_without_the_layer_leaves_it():
    compressed = compress(randomise(small()))
    before = compressed.get_submodule("0").values.clone()
    compressed.load_state_dict({}, strict=False)
    assert torch.equal(compressed.get_submodule("0").values, before)
    with pytest.raises(RuntimeError, match="Missing key"):
        compressed.load_state_dict({})


def test_exports():
    """A file that needs no class of ours to be loaded, with any batch size."""
    compressed, x = compress(randomise(small())), torch.randn(2, 3, 5, 5)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(compressed, (x,), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (2, 7):
        x = torch.randn(size, 3, 5, 5)
        assert_close(outputs(loaded, x), outputs(compressed, x), **EXACT)


# ---- networks ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(0)
    return randomise(sparsify(torchvision.models.resnet18(num_classes=10)).double())


def test_resnet18_is_fused_whole(resnet18):
    state = {name: tensor.clone() for name, tensor in resnet18.state_dict().items()}
    compressed = compress(resnet18)
    assert resnet18.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in resnet18.state_dict().items())
    assert all(param.requires_grad for param in resnet18.parameters())

    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    expected = outputs(copy.deepcopy(resnet18).eval(), x)
    assert not compressed.training
    assert_close(outputs(compressed, x), expected, rtol=1e-11, atol=1e-11)
    x = x.contiguous(memory_format=CHANNELS_LAST)
    assert_close(outputs(compressed, x), expected, rtol=1e-11, atol=1e-11)

    kinds = [type(module).__name__ for module in compressed.modules() if not module._modules]
    assert sorted(set(kinds)) == [
        *("AdaptiveAvgPool2d", "CompressedConv2d", "CompressedLinear", "MaxPool2d")
    ]
    fused = list(parts(compressed).values())
    assert fused.count("bn+residual+relu") == 8
    assert fused.count("bn+relu") == 9
    assert fused.count("bn") == 3  # downsampling
    assert set(parts(compressed)) == set(masked_layers(resnet18))
    numel = sum(p.numel() for p in compressed.parameters())
    active = sum(layer.count_active() for layer in masked_layers(resnet18).values())
    assert numel == active + 4800 + 10  # a bias for each channel, and the classifier's


def test_fp32_within_rounding(resnet18):
    """Per element some 20 layers of sums, rounded in another order; the weights once more."""
    model = copy.deepcopy(resnet18).float().eval()
    x = torch.randn(2, 3, 40, 40)
    expected = outputs(model, x)
    bound = 1e-5 * float(expected.abs().max())
    assert_close(outputs(compress(model), x), expected, rtol=0, atol=bound)


def test_bf16(resnet18):
    x = torch.randn(4, 3, 40, 40)
    compressed = compress(copy.deepcopy(resnet18).float()).bfloat16()
    truth = outputs(copy.deepcopy(resnet18).eval(), x.double())
    plain = outputs(copy.deepcopy(resnet18).eval().bfloat16(), x.bfloat16())
    error = (outputs(compressed, x.bfloat16()).double() - truth).norm()
    assert error < 1.5 * (plain.double() - truth).norm()  # no worse than the model in bf16


def test_compiles_without_a_graph_break(resnet18):
    compressed = compress(resnet18)
    torch.compiler.reset()
    compiled = torch.compile(compressed, fullgraph=True, backend="aot_eager")
    for size in ((2, 3, 40, 40), (3, 3, 40, 40)):
        x = torch.randn(size, dtype=torch.float64)
        assert_close(outputs(compiled, x), outputs(compressed, x), rtol=1e-11, atol=1e-11)


def test_copies_of_a_network(resnet18):
    compressed, x = compress(resnet18), torch.randn(1, 3, 40, 40, dtype=torch.float64)
    expected = outputs(compressed, x)
    for twin in (copy.deepcopy(compressed), pickle.loads(pickle.dumps(compressed))):
        assert parts(twin) == parts(compressed)
        assert_close(outputs(twin, x), expected, **EXACT)


def test_file_of_resnet50_at_90_percent(tmp_path):
    """All convolutions and the classifier masked: 2.55 million values, one bit a weight, biases."""
    model = torchvision.models.resnet50()
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    sparsify(model)
    for layer in masked_layers(model).values():
        numel = layer.weight.numel()
        layer.mask = (torch.randperm(numel) < numel - round(0.9 * numel)).view(layer.weight.shape)
    torch.save(compress(model).state_dict(), tmp_path / "compressed.pt")
    dense, small = ((tmp_path / f).stat().st_size for f in ("dense.pt", "compressed.pt"))
    print(f"ResNet-50 at 90 %: dense {dense:,} bytes, compressed {small:,}, 1/{dense / small:.2f}")
    assert small <= dense / 7.5


# ---- what may be fused, and what may not ---------------------------------------------------------


def block(**modules):
    """A model of named parts, 4 channels everywhere, whose forward a test supplies."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("conv", "other"):
                self.add_module(name, nn.Conv2d(4, 4, 3, padding=1))
            self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()
            for name, module in modules.items():
                self.add_module(name, module)

        def forward(self, x):
            return self.run(self, x)

    return Block


CASES = {
    # forward, what is fused into conv
    "bn-relu": (lambda m, x: m.relu(m.bn(m.conv(x))), "bn+relu"),
    "relu-alone": (lambda m, x: F.relu(m.conv(x)), "relu"),
    "torch-relu": (lambda m, x: torch.relu(m.conv(x)), "relu"),
    "method-relu": (lambda m, x: m.conv(x).relu_(), "relu"),
    "in-place-relu": (lambda m, x: F.relu(m.conv(x), inplace=True), "relu"),
    "identity-between": (lambda m, x: m.relu(m.identity(m.bn(m.identity(m.conv(x))))), "bn+relu"),
    "residual": (lambda m, x: m.relu(m.bn(m.conv(x)) + x), "bn+residual+relu"),
    "residual-first": (lambda m, x: x + m.conv(x), "residual"),
    "residual-torch-add": (lambda m, x: torch.add(m.conv(x), x), "residual"),
    "residual-method": (lambda m, x: m.conv(x).add_(x).relu(), "residual+relu"),
    "residual-computed-later": (lambda m, x: m.conv(x) + m.other(x), "residual"),
    "residual-broadcast": (lambda m, x: m.relu(m.conv(x) + x.mean((2, 3), keepdim=True)), None),
    "broadcast-to-residual": (lambda m, x: m.relu(m.conv(x.mean((2, 3), keepdim=True)) + x), None),
    "residual-scaled": (lambda m, x: torch.add(m.conv(x), x, alpha=2), ""),
    "number-added": (lambda m, x: m.relu(m.conv(x) + 1), ""),
    "twice-itself": (lambda m, x: twice(m.conv(x)), ""),
    "used-elsewhere": (lambda m, x: both(m, m.conv(x)), ""),
    "bn-used-elsewhere": (lambda m, x: both(m, m.bn(m.conv(x))), "bn"),
    "called-twice": (lambda m, x: m.relu(m.conv(m.relu(m.conv(x)))), ""),
    "two-names": (lambda m, x: m.bn(m.conv(x)), ""),
    "conv-hook": (lambda m, x: m.bn(m.conv(x)), ""),
    "bn-hook": (lambda m, x: m.relu(m.bn(m.conv(x))), ""),
    "relu-pre-hook": (lambda m, x: m.relu(m.bn(m.conv(x))), "bn"),
    "bn-without-statistics": (lambda m, x: m.relu(m.bn(m.conv(x))), ""),
    "bn-always-training": (lambda m, x: m.relu(m.bn(m.conv(x))), ""),
    "bn-subclass": (lambda m, x: m.bn(m.conv(x)), ""),
    "bn-behind-a-view": (lambda m, x: m.bn(m.conv(x).view(x.size(0), 2, 2, -1)), ""),
    "shared-weight": (lambda m, x: m.relu(m.bn(m.conv(m.other(x)))), "bn+relu"),
    "relu6": (lambda m, x: F.relu6(m.conv(x)), ""),
    "relu-out": (lambda m, x: out_of(m.conv(x), x), ""),
    "written-in-between": (lambda m, x: written(m, m.relu(x)), ""),
    "written-by-a-module": (lambda m, x: written_by_a_module(m, m.other(x)), ""),
    "written-by-the-unknown": (lambda m, x: written_by_a_function(m, m.other(x)), ""),
    "added-to-the-other": (lambda m, x: added_to_the_other(m, m.other(x)), ""),
    "added-in-place": (lambda m, x: added_in_place(m, x), "residual"),
    "relu-of-the-input": (lambda m, x: relu_of_the_input(m, x + 0), "bn+residual"),
    "bias-read": (lambda m, x: m.bn(m.conv(x)) + m.conv.bias.view(4, 1, 1), None),
}


def twice(y):
    return y + y


def both(m, y):
    return m.relu(y) - y


def out_of(y, x):
    return torch.clamp(y, 0, None, out=torch.empty_like(y))


def written(m, h):
    y = m.conv(h)
    h.mul_(2)
    return m.relu(y + h)


def written_by_a_module(m, h):
    y = m.conv(h)
    return y + m.inplace(h)


@torch.fx.wrap
def doubled(tensor):
    return tensor.mul_(2)


def written_by_a_function(m, h):
    y = m.conv(h)
    return y + doubled(h)


def added_to_the_other(m, h):
    y = m.conv(h)
    z = h
    z += y
    return z - h


def added_in_place(m, x):
    y = m.conv(x)
    y += x
    return y


def relu_of_the_input(m, x):
    """A pre-activation block: the ReLU in place changes the shortcut too."""
    shortcut = x
    return m.bn(m.conv(m.inplace(x))) + shortcut


class FrozenInTraining(nn.BatchNorm2d):
    pass


def prepare(name, model):
    """What a case needs besides its forward."""
    if name == "two-names":
        model.again = model.conv
    if name == "conv-hook":
        model.conv.register_forward_hook(lambda module, args, output: output * 2)
    if name == "bn-hook":
        model.bn.register_forward_hook(lambda module, args, output: output * 2)
    if name == "relu-pre-hook":
        model.relu.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    if name == "bn-without-statistics":
        model.bn = nn.BatchNorm2d(4, track_running_stats=False).double()
    if name == "bn-always-training":
        model.bn.train = lambda mode=True: model.bn
    if name == "bn-subclass":
        model.bn = FrozenInTraining(4).double()
    if name == "bn-behind-a-view":
        model.bn = nn.BatchNorm2d(2).double()
    if name == "shared-weight":
        model.other.weight = model.conv.weight
    return model


@pytest.mark.parametrize("name", CASES)
def test_fused_or_not_the_result_is_the_same(name):
    run, expected = CASES[name]
    model = block(identity=nn.Identity(), inplace=nn.ReLU(inplace=True))()
    type(model).run = staticmethod(run)
    model = randomise(prepare(name, sparse(model)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if name in ("bias-read", "relu-out") else "error")
        compressed = compress(model)
    fused = parts(compressed)["conv"]
    if expected is not None:
        assert fused == expected
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert_close(outputs(compressed, x), outputs(copy.deepcopy(model).eval(), x), **FP64)
    unfused = compress(model, fuse=False)
    assert_close(outputs(unfused, x), outputs(copy.deepcopy(model).eval(), x), **FP64)
    assert set(parts(unfused).values()) == {""}
    assert type(unfused) is type(model)


def test_dense_convolutions_take_the_batch_norm_too():
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double())
    model.append(nn.Conv2d(4, 2, 1).double())
    sparsify(model, include=("3",))
    compressed = compress(model)
    assert [type(module).__name__ for module in compressed.children()] == [
        *("Conv2d", "ReLU", "CompressedConv2d")
    ]
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert_close(outputs(compressed, x), outputs(model.eval(), x), **FP64)


class ReadsADenseWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.head(self.bn(self.conv(x))) * self.conv.weight.sum()


def test_a_weight_that_forward_reads_is_not_folded():
    model = randomise(sparsify(ReadsADenseWeight(), include=("head",)).double())
    compressed, x = compress(model), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    assert isinstance(compressed.get_submodule("bn"), nn.BatchNorm2d)
    result = compressed(x)  # not under no_grad: nothing in it requires a gradient
    assert_close(result, outputs(model.eval(), x), **FP64)


def test_hooks_stay_on_the_layer():
    model = sparse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    calls = []
    model[0].register_forward_hook(lambda module, args, output: calls.append(type(module)))
    outputs(compress(model), torch.randn(1, 3, 2, 2, dtype=torch.float64))
    assert calls == [CompressedConv2d]


# ---- models that cannot be traced ----------------------------------------------------------------


def features():
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


class Untraceable(nn.Module):
    """Decides by values; its parts do not."""

    def __init__(self):
        super().__init__()
        self.features, self.head = features(), nn.Linear(4, 2)
        self.width = 4

    def forward(self, x):
        y = self.features(x)
        if x.sum() > 0:
            y = y * 2
        return self.head(y.mean((2, 3)))


class Optional(Untraceable):
    def forward(self, x, scale=None):
        y = self.features(x)
        return y if scale is None else y * scale


class MakesTensors(Untraceable):
    def forward(self, x):
        return self.features(x) + torch.ones(4, 1, 1, dtype=torch.float64)


class ReadsTheWeight(Untraceable):
    def forward(self, x):
        return self.features(x) * self.head.weight.sum()


class Hooked(Untraceable):
    def __init__(self):
        super().__init__()
        self.register_forward_pre_hook(lambda module, args: (args[0] + 1,))

    def forward(self, x):
        return self.features(x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Untraceable, "TraceError"),
        (Optional, "optional argument scale=None"),
        (MakesTensors, "makes tensors"),
        (ReadsTheWeight, "reads head.weight"),
        (Hooked, "has hooks"),
    ],
)
def test_untraceable_models_keep_their_class_and_say_so(kind, reason):
    model = sparse(kind())
    with pytest.warns(UserWarning, match=f"{kind.__name__} cannot be traced: .*{reason}") as caught:
        compressed = compress(model)
    assert caught[0].filename == __file__
    assert type(compressed) is kind
    assert compressed.width == 4
    assert parts(compressed)["features.0"] == "bn+relu"
    model.eval()
    for sign in (-1, 1):
        x = sign * torch.rand(2, 4, 5, 5, dtype=torch.float64)
        assert_close(outputs(compressed, x), outputs(model, x), **FP64)
        if kind is Optional:
            assert_close(outputs(compressed, x, 3.0), outputs(model, x, 3.0), **FP64)
    unfused = compress(model, fuse=False)
    assert_close(outputs(unfused, x), outputs(model, x), **FP64)


def test_a_fused_sequential_cannot_be_taken_apart():
    with pytest.warns(UserWarning, match="cannot be traced"):
        compressed = compress(sparse(Untraceable()))
    with pytest.raises(TypeError, match="FusedSequential"):
        list(compressed.features)


class Watched(nn.Module):
    """Traceable, but for one part, which is hidden in the middle."""

    def __init__(self, inner):
        super().__init__()
        self.stem, self.inner = features(), inner

    def forward(self, x):
        return self.inner(self.stem(x))


@pytest.mark.parametrize("how", ["control-flow", "hook"])
def test_one_part_that_cannot_be_traced_is_called_as_it_is(how):
    calls = []
    if how == "hook":
        inner = nn.Sequential(features(), nn.AdaptiveAvgPool2d(1))
        inner.register_forward_hook(lambda module, args, output: calls.append(1) or output + 1)
    else:
        inner = Untraceable()
    model = sparse(Watched(inner))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compressed = compress(model)
    name = "inner.0.0" if how == "hook" else "inner.features.0"
    assert parts(compressed)["stem.0"] == parts(compressed)[name] == "bn+relu"
    assert calls == []  # not while tracing
    x = torch.rand(2, 4, 5, 5, dtype=torch.float64)
    result = outputs(compressed, x)
    assert len(calls) == (how == "hook")
    assert_close(result, outputs(model.eval(), x), **FP64)


class DecidesByType(Untraceable):
    """What tracing cannot see: a proxy is no tensor."""

    def forward(self, x):
        return self.features(x * 2 if isinstance(x, torch.Tensor) else x)


def test_example_input_finds_what_tracing_did_not_see():
    model = sparse(DecidesByType())
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="example_input: the compressed model's output differs"):
        compress(model, example_input=x)
    assert_close(
        outputs(compress(model, fuse=False, example_input=(x,)), x), outputs(model.eval(), x)
    )
    compress(sparse(Watched(nn.Identity())), example_input=x)


def test_a_single_layer_is_a_model():
    assert isinstance(compress(conv()), CompressedConv2d)
    assert isinstance(compress(MaskedLinear(3, 4)), CompressedLinear)


def test_transformers_keep_working():
    """Their fast path reads the weights of their linear layers."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = sparsify(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()
    randomise(model)
    with pytest.warns(UserWarning, match="cannot be traced"):
        compressed = compress(model)
    x = torch.randn(2, 5, 8)
    assert_close(outputs(compressed, x), model(x).detach(), rtol=0, atol=1e-5)


def test_subclasses_stay():
    class Special(MaskedLinear):
        def forward(self, input):
            return super().forward(input) + 1

    model = nn.Sequential(Special(3, 3), MaskedLinear(3, 3))
    compressed = compress(model)
    assert [type(m) for m in compressed.children()] == [Special, CompressedLinear]


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(), torchvision.ops.MLP(2, [2])])
def test_a_model_without_masked_layers_is_refused(model):
    with pytest.raises(ValueError, match="model: expected a MaskedConv2d or MaskedLinear in it"):
        compress(model)
