"""The choice between sparse and dense layers, and what must not depend on it."""

import copy

import pytest
import torch
import torch.nn.functional as F

from granet_kernels import (
    MaskedConv2d,
    MaskedLinear,
    MaskedSGD,
    mask_cast,
    masked_linear,
    pack_mask,
)
from granet_kernels.backends.cpp.cost import prefers_sparse
from granet_kernels.backends.cpp.index import Shape

ALGORITHMS = ("sparse", "dense")


def sparse_layer(*args, sparsity=0.7, **options):
    layer = MaskedConv2d(*args, **options)
    layer.mask = torch.rand(layer.weight.shape) >= sparsity
    return layer


def test_repr_shows_what_was_chosen():
    layer = sparse_layer(64, 64, 3, padding=1, sparsity=0.95)
    assert "algorithm" not in repr(layer)
    layer(torch.randn(2, 64, 16, 16))
    assert repr(layer).endswith("algorithm=auto: sparse)")
    layer.algorithm = "dense"
    assert repr(layer).endswith("algorithm=dense)")


def test_unknown_algorithm_is_refused():
    layer = MaskedLinear(3, 2)
    refused = pytest.raises(ValueError, match=r"algorithm: expected one of .*'sparse'.* got 'fast'")
    with refused:
        layer.algorithm = "fast"
    assert layer.algorithm == "auto"
    with refused:
        masked_linear(torch.ones(1, 3), layer.weight, layer.packed_mask, algorithm="fast")


def test_cost_grows_with_active_weights_and_decides_once():
    shape = Shape(8, 64, 28, 28, 64, 3, 3, 1, 1, 1, 1, 1, 1, 1)
    chosen = [prefers_sparse(shape, active, torch.float32) for active in range(0, 36865, 512)]
    assert chosen[0]
    assert not chosen[-1]
    assert chosen == sorted(chosen, reverse=True)


@pytest.mark.parametrize(
    ("layer", "size"), [(MaskedLinear(9, 4), (3, 9)), (MaskedConv2d(3, 4, 3), (2, 3, 8, 8))]
)
def test_without_an_inactive_weight_it_is_the_dense_layer_to_the_bit(layer, size):
    x = torch.randn(size)
    assert torch.equal(layer(x), layer.to_dense()(x))
    layer.mask = torch.arange(layer.weight.numel()).view_as(layer.weight) > 0
    layer(x)
    assert repr(layer).endswith(
        "algorithm=auto: sparse)"
    )  # so small that the choice is a matter of calls


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_whoever_writes_to_mask_or_weight_is_noticed(algorithm):
    layer = sparse_layer(8, 8, 3, padding=1, bias=False)
    layer.algorithm = algorithm
    x = torch.randn(2, 8, 9, 9)
    layer(x)
    layer.weight.data.mul_(3)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, padding=1))
    layer.packed_mask.data.zero_()
    assert not layer(x).any()
    output = layer(x.requires_grad_())
    layer.packed_mask.data.fill_(0xFF)
    layer.weight.data.mul_(2)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    expected = F.conv_transpose2d(torch.ones_like(output), layer.weight, padding=1)
    torch.testing.assert_close(gradient, expected)


def test_backward_uses_the_weight_that_it_is_given():
    """And not what an earlier forward pass fetched from another one, or an earlier version of it."""
    mask = pack_mask(torch.rand(8, 16) < 0.5)
    x, gradient = torch.randn(4, 16), torch.randn(4, 8)
    flag = torch.tensor(False)

    def input_gradient(weight, dtype=torch.float32):
        (result,) = torch.ops.granet.masked_linear_backward(
            *(gradient.to(dtype), x.to(dtype), weight, mask, None, flag),
            [True, False, False],
            algorithm="sparse",
        )
        return result

    def expected(weight, dtype=torch.float32):
        return gradient.to(dtype) @ mask_cast(weight, mask, dtype)

    first, second = torch.randn(8, 16), torch.randn(8, 16)
    torch.ops.granet.masked_linear(x, first, mask, None, algorithm="sparse")
    torch.testing.assert_close(input_gradient(first), expected(first))
    torch.testing.assert_close(input_gradient(second), expected(second))
    first.mul_(2)
    torch.testing.assert_close(input_gradient(first), expected(first))
    low = torch.bfloat16
    torch.ops.granet.masked_linear(x.to(low), first, mask, None, algorithm="sparse")
    torch.testing.assert_close(input_gradient(first, low), expected(first, low))
    torch.testing.assert_close(input_gradient(first), expected(first))  # not rounded to bfloat16


def test_layers_train_from_inference_tensors_and_under_other_defaults():
    layer = MaskedLinear(16, 8)
    layer.algorithm = "sparse"
    with torch.inference_mode():
        loaded = copy.deepcopy(layer)
        assert torch.equal(loaded(torch.ones(2, 16)), layer(torch.ones(2, 16)))
    torch.set_default_dtype(torch.float64)
    try:
        layer(torch.ones(2, 16, dtype=torch.float32)).sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.weight.grad is not None


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bits_behind_the_last_weight_change_nothing(algorithm):
    layer = MaskedConv2d(3, 3, 1)
    layer.algorithm = algorithm
    layer.packed_mask.fill_(0xFF)
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    for _ in range(20):
        output = layer(x)
    output.sum().backward()
    torch.testing.assert_close(output, F.conv2d(x, layer.weight, layer.bias))


@pytest.mark.parametrize("length", [7, 200])
def test_one_column_with_the_strides_of_a_row(length):
    layer = sparse_layer(6, 5, 1)
    rows = torch.randn(3, 6, 1, length)
    outputs = []
    for algorithm in ALGORITHMS:
        layer.algorithm = algorithm
        outputs.append(layer(rows.transpose(2, 3).requires_grad_()))
        outputs[-1].transpose(2, 3).square().sum().backward()
    torch.testing.assert_close(*outputs)


def test_gradients_without_memory_of_their_own():
    weight = torch.randn(8, 8, requires_grad=True)
    mask = torch.rand(8, 8) < 0.5
    mask_cast(weight, pack_mask(mask)).sum().backward()
    assert torch.equal(weight.grad, mask.float())
    layer = MaskedLinear(8, 8, bias=False)
    expected = copy.deepcopy(layer)
    layer.weight.grad, expected.weight.grad = torch.ones(()).expand(8, 8), torch.ones(8, 8)
    for one in (layer, expected):
        MaskedSGD(one.parameters(), lr=0.1).step()
    assert torch.equal(layer.weight, expected.weight)


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def results_of(layer, input, grad_output):
    """Output and both gradients."""
    layer.zero_grad()
    leaf = input.clone().requires_grad_()
    output = layer(leaf)
    output.backward(grad_output)
    return [output.detach(), leaf.grad, layer.weight.grad]


@pytest.mark.parametrize("side", [56, 57])  # planes that begin at a cache line, and that do not
def test_pointwise_layers_larger_than_the_caches(side, three_threads):
    """Output or input gradient of 20 MB and more, which are written past the caches."""
    wide = sparse_layer(16, 224, 1, sparsity=0.9)
    narrow = sparse_layer(224, 16, 1, sparsity=0.9)
    small = torch.randn(8, 16, side, side)
    large = torch.randn(8, 224, side, side)
    for layer, input, grad_output in ((wide, small, large), (narrow, large, small)):
        layer.algorithm = "dense"
        dense = results_of(layer, input, grad_output)
        layer.algorithm = "sparse"
        sparse = results_of(layer, input, grad_output)
        torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-3)
        torch.set_num_threads(1)
        assert all(map(torch.equal, sparse, results_of(layer, input, grad_output)))
        torch.set_num_threads(3)
