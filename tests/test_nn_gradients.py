"""The gradients of masked layers, by backward(), torch.func and compiled code."""

import itertools

import pytest
import torch
from torch.func import functional_call
from torch.testing import assert_close

from granet_kernels import MaskedConv2d, MaskedLinear
from tests.helpers import EXACT, FP64
from tests.sample_layers import (
    INPUTS,
    assert_same_results,
    dense_twin,
    kind,
    random_mask,
    results,
    sparse,
)

__all__ = ["kind"]


# ---- which gradients there are -------------------------------------------------------------------


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
    ours.algorithm = "dense"  # sums in the same order as torch's layer
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
    ours.algorithm = "dense"  # gradients of some thousands, which sums in another order tell apart
    for layer in (ours, theirs):
        layer(input).sum().backward()  # an expanded one
        layer(input)[..., ::2].square().sum().backward()
        layer(input).transpose(0, -1).reshape(-1).cumsum(0).sum().backward()
    assert_close(ours.weight.grad, torch.where(ours.mask, theirs.weight.grad, 0.0))
    assert_close(ours.bias.grad, theirs.bias.grad)


def test_dense_grad_gives_inactive_weights_their_gradient(kind):
    ours = sparse(kind, dtype=torch.float64)
    theirs = dense_twin(ours)
    input = torch.randn(INPUTS[kind], dtype=torch.float64)
    ours.dense_grad.fill_(True)
    assert_same_results(ours, theirs, input, **FP64)
    ours.dense_grad.fill_(False)
    assert_same_results(ours, theirs, input, mask=ours.mask, **FP64)


def test_double_backward_is_refused():
    layer = MaskedLinear(3, 2)
    loss = layer(torch.randn(4, 3)).square().sum()
    (grad,) = torch.autograd.grad(loss, layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---- gradients by differences --------------------------------------------------------------------


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


# ---- torch.func, torch.compile -------------------------------------------------------------------


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
