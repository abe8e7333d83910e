"""A small masked layer of each kind, and its comparison with a dense one."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from granet_kernels import MaskedConv2d, MaskedLinear

DENSE = {nn.Conv2d: MaskedConv2d, nn.Linear: MaskedLinear}


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
