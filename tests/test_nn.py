"""MaskedConv2d and MaskedLinear against nn.Conv2d and nn.Linear, and a masked layer's life."""

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.testing import assert_close
from torch.testing._internal.common_modules import module_db

from granet_kernels import MaskedConv2d, MaskedLinear, MaskedSGD, attached_mask, pack_mask
from granet_kernels.layout import full_mask
from tests.helpers import NAN, bits

CHANNELS_LAST = torch.channels_last
DENSE = {nn.Conv2d: MaskedConv2d, nn.Linear: MaskedLinear}
EXACT = {"rtol": 0, "atol": 0}
FP64 = {"rtol": 0, "atol": 1e-12}  # sums of some hundred products of numbers about 1


def conv(**options):
    return MaskedConv2d(4, 6, (3, 2), **options)


def linear(**options):
    return MaskedLinear(5, 7, **options)


LAYERS = {"conv": conv, "linear": linear}
INPUTS = {"conv": (2, 4, 6, 5), "linear": (3, 5)}


@pytest.fixture(params=LAYERS)
def kind(request):
    return request.param


def random_mask(layer, seed=1):
    """Without symmetry: a mask that is repacked in a wrong order is another mask."""
    return torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.4


def sparse(kind, **options):
    layer = LAYERS[kind](**options)
    layer.mask = random_mask(layer)
    return layer


def dense_twin(layer):
    """The layer of torch.nn with the same parameters, the weight times the mask."""
    twin = copy.deepcopy(layer).to_dense()
    with torch.no_grad():
        twin.weight.copy_(torch.where(layer.mask, layer.weight, 0.0))
    return twin


def results(layer, input, *, autocast=False):
    """Output and gradients of input, weight, bias, for a gradient of the output that varies."""
    input = input.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    for param in layer.parameters():
        param.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = layer(input)
    cotangent = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)
    output.backward(cotangent)
    return [output.detach(), input.grad, *(param.grad for param in layer.parameters())]


def assert_same_results(ours, theirs, input, *, mask=True, message="", autocast=False, **bound):
    """``mask``: what the weight's gradient of the dense layer is multiplied with."""
    names = ("output", "input.grad", *(f"{name}.grad" for name, _ in theirs.named_parameters()))
    actual, expected = (results(layer, input, autocast=autocast) for layer in (ours, theirs))
    for name, one, other in zip(names, actual, expected, strict=True):
        if name == "weight.grad":
            other = torch.where(torch.as_tensor(mask), other, 0.0)
        assert_close(one, other, **bound, msg=lambda m, n=name: f"{message} {n}: {m}")


# ---- all weights active: the layers of torch.nn --------------------------------------------------


def cases_of_torch():
    for info in module_db:
        if info.module_cls in DENSE:
            for training in (True, False):
                inputs = info.module_inputs_func(
                    info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
                )
                for case in inputs:
                    yield info.module_cls, case


CASES = list(cases_of_torch())


@pytest.mark.parametrize(
    ("dense_class", "case"), CASES, ids=[f"{cls.__name__}-{case.desc}" for cls, case in CASES]
)
def test_equals_torch_on_its_own_cases(dense_class, case):
    args, kwargs = case.constructor_input.args, case.constructor_input.kwargs
    theirs = dense_class(*args, **kwargs, dtype=torch.float64)
    ours = DENSE[dense_class](*args, **kwargs, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    (input,) = (*case.forward_input.args, *case.forward_input.kwargs.values())
    assert_same_results(ours, theirs, input, **FP64)


def conv_pair(*args, dtype=torch.float64, **kwargs):
    theirs = nn.Conv2d(*args, **kwargs, dtype=dtype)
    ours = MaskedConv2d(*args, **kwargs, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 1, (2, 1), (0, 3), "valid", "same"], ids=str)
@pytest.mark.parametrize("kernel", [3, (2, 4), (1, 1)], ids=str)
def test_conv_equals_torch_over_its_options(mode, padding, kernel):
    """Depthwise is groups=4; "same" with the even kernel pads one side more than the other."""
    for stride, dilation, groups, bias in itertools.product(
        (1, (2, 3)), (1, (2, 1)), (1, 2, 4), (True, False)
    ):
        if padding == "same" and stride != 1:
            continue
        options = {
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "bias": bias,
            "padding_mode": mode,
        }
        ours, theirs = conv_pair(4, 8, kernel, **options)
        for shape in ((2, 4, 7, 8), (4, 7, 8)):
            input = torch.randn(shape, dtype=torch.float64)
            assert_same_results(ours, theirs, input, message=f"{options} {shape}", **FP64)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_conv_same_padding_of_an_even_kernel_with_dilation(mode):
    ours, theirs = conv_pair(2, 3, (4, 2), padding="same", dilation=(1, 3), padding_mode=mode)
    assert_same_results(ours, theirs, torch.randn(1, 2, 9, 8, dtype=torch.float64), **FP64)


@pytest.mark.parametrize("shape", [(0, 4, 6, 5), (1, 4, 6, 5), (4, 6, 5), (2, 4, 3, 2)], ids=str)
def test_conv_batches(shape):
    ours, theirs = conv_pair(4, 6, (3, 2))
    assert_same_results(ours, theirs, torch.randn(shape, dtype=torch.float64), **FP64)


@pytest.mark.parametrize("shape", [(5,), (0, 5), (1, 5), (3, 5), (2, 3, 5), (2, 0, 3, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_linear_batches(shape, bias):
    theirs = nn.Linear(5, 7, bias=bias, dtype=torch.float64)
    ours = MaskedLinear(5, 7, bias=bias, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    assert_same_results(ours, theirs, torch.randn(shape, dtype=torch.float64), **FP64)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("fan_in", "fan_out"), [(4, 0), (0, 4)], ids=["no-output", "no-input"])
@pytest.mark.parametrize("batch", [(2,), ()], ids=["batch", "no-batch"])
def test_linear_without_features(fan_in, fan_out, batch):
    theirs, ours = nn.Linear(fan_in, fan_out), MaskedLinear(fan_in, fan_out)
    ours.load_state_dict(theirs.state_dict())
    assert_same_results(ours, theirs, torch.randn(*batch, fan_in), **EXACT)
    assert ours.sparsity == 0.0


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_dtypes(kind, dtype):
    ours = LAYERS[kind]().to(dtype)
    assert_same_results(ours, dense_twin(ours), torch.randn(INPUTS[kind]).to(dtype))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("weight_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("input_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_conv_memory_formats(weight_format, input_format, autocast, masked):
    ours = sparse("conv") if masked else conv()
    ours.to(memory_format=weight_format)
    theirs = dense_twin(ours)
    input = torch.randn(2, 4, 6, 5).contiguous(memory_format=input_format)
    assert_same_results(ours, theirs, input, mask=ours.mask, autocast=autocast)
    ours_out, theirs_out = ours(input), theirs(input)
    assert ours_out.stride() == theirs_out.stride()
    ours_out.sum().backward()
    assert ours.weight.grad.stride() == ours.weight.stride()


@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_autocast_gives_the_dtypes_of_torch(kind, masked):
    ours = sparse(kind) if masked else LAYERS[kind]()
    input = torch.randn(INPUTS[kind])
    assert_same_results(ours, dense_twin(ours), input, mask=ours.mask, autocast=True)
    actual, expected = (results(m, input, autocast=True) for m in (ours, dense_twin(ours)))
    assert [t.dtype for t in actual] == [t.dtype for t in expected]
    assert actual[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "frozen",
    [*itertools.product((False, True), repeat=3)],
    ids=lambda f: "".join("ox"[x] for x in f),
)
def test_only_the_gradients_that_are_asked_for(kind, frozen):
    """x is frozen, o is not, of input, weight and bias."""
    ours = sparse(kind)
    theirs = dense_twin(ours)
    expected = results(theirs, input := torch.randn(INPUTS[kind]))[1:]
    expected[1] = torch.where(ours.mask, expected[1], 0.0)
    leaves = [input.clone(), ours.weight, ours.bias]
    for leaf, is_frozen in zip(leaves, frozen, strict=True):
        leaf.requires_grad_(not is_frozen)
    output = ours(leaves[0])
    assert output.requires_grad == (not all(frozen))
    if not all(frozen):
        output.backward(torch.linspace(-1, 1, output.numel()).view(output.shape))
    for leaf, is_frozen, grad in zip(leaves, frozen, expected, strict=True):
        if is_frozen:
            assert leaf.grad is None
        else:
            assert_close(leaf.grad, grad)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(kind, context):
    ours = sparse(kind)
    input = torch.randn(INPUTS[kind])
    with context():
        output = ours(input)
    assert not output.requires_grad
    assert_close(output.clone(), dense_twin(ours)(input).detach(), **EXACT)


def test_gradients_accumulate(kind):
    ours = sparse(kind)
    input = torch.randn(INPUTS[kind])
    ours(input).sum().backward()
    once = ours.weight.grad.clone()
    ours(input).sum().backward()
    assert_close(ours.weight.grad, 2 * once)


def test_expanded_and_strided_gradients_of_the_output(kind):
    ours = sparse(kind)
    theirs = dense_twin(ours)
    input = torch.randn(INPUTS[kind])
    for layer in (ours, theirs):
        layer(input).sum().backward()  # an expanded one
        layer(input)[..., ::2].square().sum().backward()
        layer(input).transpose(0, -1).reshape(-1).cumsum(0).sum().backward()
    assert_close(ours.weight.grad, torch.where(ours.mask, theirs.weight.grad, 0.0))
    assert_close(ours.bias.grad, theirs.bias.grad)


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


def test_dense_grad_gives_inactive_weights_their_gradient(kind):
    ours = sparse(kind, dtype=torch.float64)
    theirs = dense_twin(ours)
    input = torch.randn(INPUTS[kind], dtype=torch.float64)
    ours.dense_grad.fill_(True)
    assert_same_results(ours, theirs, input, **FP64)
    ours.dense_grad.fill_(False)
    assert_same_results(ours, theirs, input, mask=ours.mask, **FP64)


@pytest.mark.parametrize("dense", [False, True], ids=["masked-grad", "dense-grad"])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 1, "groups": 2}, {"padding": "same", "padding_mode": "circular"}],
    ids=["plain", "strided-groups", "circular"],
)
def test_gradcheck_conv(options, dense):
    layer = MaskedConv2d(2, 4, (3, 2), dtype=torch.float64, **options)
    layer.mask = random_mask(layer)
    layer.dense_grad.fill_(dense)
    input = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert_gradcheck(layer, input, dense)


@pytest.mark.parametrize("dense", [False, True], ids=["masked-grad", "dense-grad"])
@pytest.mark.parametrize("shape", [(3,), (2, 2, 3)], ids=str)
def test_gradcheck_linear(shape, dense):
    layer = MaskedLinear(3, 4, dtype=torch.float64)
    layer.mask = random_mask(layer)
    layer.dense_grad.fill_(dense)
    assert_gradcheck(layer, torch.randn(shape, dtype=torch.float64, requires_grad=True), dense)


def assert_gradcheck(layer, input, dense):
    """The dense gradient is that of a weight without a mask: check it where that is the function."""
    if dense:
        layer.mask = torch.ones_like(layer.mask)

    def function(input, weight, bias):
        return functional_call(layer, {"weight": weight, "bias": bias}, input)

    assert torch.autograd.gradcheck(function, (input, layer.weight, layer.bias))


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


# ---- shape errors --------------------------------------------------------------------------------


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
    assert_close(dense(input), layer(input), **EXACT)
    assert type(LAYERS[kind]().dense_type) is type(nn.Linear)


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


# ---- torch.compile -------------------------------------------------------------------------------


def test_compiles_whole_and_once(kind):
    """Masks, weights and dense_grad are data: changing them gives new results and no new code."""
    ours = sparse(kind)
    input = torch.randn(INPUTS[kind])
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_compiled_equals(compiled, ours, input)
    with torch.compiler.set_stance("fail_on_recompile"):
        ours.mask = random_mask(ours, seed=2)
        assert_compiled_equals(compiled, ours, input)
        ours.dense_grad.fill_(True)
        assert_compiled_equals(compiled, ours, input)
        ours.dense_grad.fill_(False)
        ours.load_state_dict(sparse(kind).state_dict())
        assert_compiled_equals(compiled, ours, input)


def assert_compiled_equals(compiled, eager, input):
    actual, expected = results(compiled, input), results(eager, input)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize(
    "layer", [MaskedConv2d(3, 4, 3), MaskedLinear(8, 4)], ids=["conv", "linear"]
)
def test_torch_func_grad(layer):
    """The functional transforms see the same gradients as backward()."""
    layer.mask = torch.rand(layer.weight.shape) < 0.5
    x = torch.randn(2, 3, 8, 8)

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    parameters = dict(layer.named_parameters())
    functional = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    for name, parameter in parameters.items():
        assert torch.equal(functional[name], parameter.grad)


def test_double_backward_is_refused():
    layer = MaskedLinear(3, 2)
    loss = layer(torch.randn(4, 3)).square().sum()
    (grad,) = torch.autograd.grad(loss, layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


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


@pytest.mark.parametrize(
    "layer", [MaskedConv2d(3, 4, 3), MaskedLinear(8, 4)], ids=["conv", "linear"]
)
def test_a_bias_elsewhere_is_refused(layer):
    layer.bias = torch.nn.Parameter(torch.zeros(4, device="meta"))
    with pytest.raises(ValueError, match="bias: expected a tensor on cpu as weight, got meta"):
        layer(torch.randn(2, 3, 8, 8))
