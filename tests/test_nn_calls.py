"""What a layer leaves out of a call that nobody watches, or that is like an earlier one."""

from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import granet_kernels
from tests.sample_layers import INPUTS, kind, results, sparse

__all__ = ["kind"]

NAMES = {"conv": "masked_conv2d", "linear": "masked_linear"}


def watched(kind):
    """A sparse layer that has computed before, and its input."""
    layer = sparse(kind)
    layer.algorithm = "sparse"
    input = torch.randn(INPUTS[kind])
    results(layer, input)
    return layer, input


# ---- the dispatcher ------------------------------------------------------------------------------


class Names(TorchDispatchMode):
    """The operators that pass."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


def test_modes_see_the_operators(kind):
    layer, input = watched(kind)
    expected = results(layer, input)
    with Names() as names:
        got = results(layer, input)
    assert {f"granet::{NAMES[kind]}", f"granet::{NAMES[kind]}_backward"} <= {*names.seen}
    assert_close(got, expected, rtol=0, atol=0)


def test_a_mode_that_begins_between_forward_and_backward_sees_the_rest(kind):
    layer, input = watched(kind)
    output = layer(input.requires_grad_())
    with Names() as names:
        output.sum().backward()
    assert f"granet::{NAMES[kind]}_backward" in names.seen


def test_profilers_see_the_operators(kind):
    layer, input = watched(kind)
    with torch.profiler.profile() as profile:
        results(layer, input)
    seen = {event.key for event in profile.key_averages()}
    assert {f"granet::{NAMES[kind]}", f"granet::{NAMES[kind]}_backward"} <= seen


class Counted(torch.Tensor):
    """A tensor that counts the operators it is given to."""

    calls: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.calls.append(function.name())
        plain = torch.utils._pytree.tree_map_only(cls, lambda t: t.plain, (args, kwargs or {}))
        return function(*plain[0], **plain[1])

    @staticmethod
    def __new__(cls, plain):
        made = torch.Tensor._make_wrapper_subclass(cls, plain.shape, dtype=plain.dtype)
        made.plain = plain
        return made


def test_subclasses_of_tensors_see_the_operators(kind):
    layer, input = watched(kind)
    Counted.calls.clear()
    with torch.no_grad():
        output = layer(Counted(input))
    assert f"granet::{NAMES[kind]}" in Counted.calls
    assert_close(output, layer(input).detach(), rtol=0, atol=0)


def test_tracing_keeps_the_operators(kind):
    layer, input = watched(kind)
    exported = torch.export.export(layer.eval(), (input,))
    assert NAMES[kind] in str(exported.graph)
    assert_close(exported.module()(input), layer(input))


def test_nodes_of_the_graph_have_the_name_of_the_function(kind):
    layer, input = watched(kind)
    assert layer(input).grad_fn.name() == f"{type(layer).__name__}FunctionBackward"


# ---- the checks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", granet_kernels.available_backends())
@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("bias", lambda layer, input: setattr(layer, "bias", nn.Parameter(torch.ones(5)))),
        ("input", lambda layer, input: input.resize_(*input.shape[:-1], 0)),
        ("input", lambda layer, input: setattr(input, "data", input.double())),
        ("weight", lambda layer, input: setattr(layer, "weight", nn.Parameter(torch.ones(3)))),
        ("algorithm", lambda layer, input: layer.__dict__.update(_algorithm="other")),
    ],
    ids=["bias", "empty", "dtype", "weight", "algorithm"],
)
def test_an_argument_that_has_changed_is_checked(kind, backend, argument, change):
    with granet_kernels.use_backend(backend):
        layer, input = watched(kind)
        change(layer, input)
        with pytest.raises((ValueError, RuntimeError), match=argument):
            layer(input)


@pytest.mark.parametrize("backend", granet_kernels.available_backends())
@pytest.mark.parametrize(
    "change", [lambda g: g[:-1], lambda g: g[..., 1:], lambda g: g.double()], ids=range(3)
)
def test_a_gradient_that_has_changed_is_checked(kind, backend, change):
    with granet_kernels.use_backend(backend):
        layer, input = watched(kind)
        tensors = (input, layer.weight, layer.packed_mask, layer.bias, layer.dense_grad)
        geometry = [[1, 1], [0, 0], [1, 1], 1] if kind == "conv" else []
        backward = getattr(torch.ops.granet, f"{NAMES[kind]}_backward")
        with torch.no_grad():
            gradient = torch.ones_like(layer(input))
            right = backward(gradient, *tensors, *geometry, [True] * 3)
            assert [g.shape for g in right] == [input.shape, layer.weight.shape, layer.bias.shape]
            with pytest.raises(ValueError, match="grad_output: expected"):
                backward(change(gradient), *tensors, *geometry, [True] * 3)


@pytest.mark.parametrize("backend", granet_kernels.available_backends())
def test_a_mask_that_changes_between_forward_and_backward(kind, backend):
    """Autograd refuses what it sees; else the gradients are those of the mask as it is then."""
    with granet_kernels.use_backend(backend):
        layer, input = watched(kind)
        output = layer(input.requires_grad_())
        layer.packed_mask.data.zero_()
        layer.weight.grad = None
        output.sum().backward()
        assert not input.grad.any()
        assert not layer.weight.grad.any()
