"""MaskedConv2d and MaskedLinear against nn.Conv2d and nn.Linear, over all their options."""

import contextlib
import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.testing._internal.common_modules import module_db

import granet_kernels
from granet_kernels import MaskedConv2d, MaskedLinear
from tests.helpers import CHANNELS_LAST, EXACT, FP64
from tests.sample_layers import (
    DENSE,
    INPUTS,
    LAYERS,
    assert_same_results,
    conv,
    dense_twin,
    kind,
    results,
    sparse,
)

__all__ = ["kind"]


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


SHAPES = {"conv": [(4, 6, 5), (2, 4, 6, 5)], "linear": [(5,), (3, 5), (2, 3, 5)]}


@pytest.mark.parametrize("backend", granet_kernels.available_backends())
@pytest.mark.parametrize("algorithm", ["dense", "sparse"])
@pytest.mark.parametrize("watched", [False, True], ids=["", "watched"])
def test_outputs_may_be_written_to(kind, backend, algorithm, watched):
    """As ``nn.ReLU(inplace=True)`` does; autograd forbids it for a view that a function returns."""
    with granet_kernels.use_backend(backend):
        ours = sparse(kind)
        ours.algorithm = algorithm
        for shape in SHAPES[kind]:
            input = torch.randn(shape, requires_grad=True)
            with torch.profiler.profile() if watched else contextlib.nullcontext():
                output = ours(input)
            expected = torch.autograd.grad(dense_twin(ours)(input).relu().sum(), input)
            output.relu_()
            assert_close(torch.autograd.grad(output.sum(), input), expected)


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
