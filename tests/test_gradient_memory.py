"""Gradients of large weights in memory that the cpp backend keeps: nobody may notice, but by the clock."""

import gc
import weakref

import pytest
import torch

from granet_kernels import MaskedConv2d, MaskedLinear, use_backend
from granet_kernels.selftest import backends_with

pytestmark = pytest.mark.skipif(
    "cpp" not in backends_with("masked_linear"), reason="the cpp backend is not built"
)


@pytest.fixture(autouse=True)
def kept_from_the_first_byte(monkeypatch):
    from granet_kernels.backends.cpp import memory

    monkeypatch.setattr(memory, "LEAST_BYTES", 1)
    with use_backend("cpp"):
        yield


def linear_layer(dtype=torch.float32):
    layer = MaskedLinear(33, 31, bias=False)
    layer.mask = torch.rand(31, 33) < 0.1
    layer.algorithm = "sparse"
    return layer.to(dtype)


def backward(layer, *, seed=0):
    """The gradient of the weight, from a random input; as autograd has it."""
    layer.weight.grad = None
    generator = torch.Generator().manual_seed(seed)
    size = (7, 33) if isinstance(layer, MaskedLinear) else (2, 9, 8, 8)
    output = layer(torch.randn(size, generator=generator).to(layer.weight.dtype))
    output.backward(torch.randn(output.shape, generator=generator).to(output.dtype))
    return layer.weight.grad


def address_of_next(layer):
    return backward(layer).data_ptr()


def expected(layer, *, seed=0):
    """The same gradient by the reference."""
    with use_backend("reference"):
        return backward(layer, seed=seed).clone()


def test_memory_is_used_again():
    layer = linear_layer()
    assert len({address_of_next(layer) for _ in range(3)}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv", "channels_last"])
def test_nothing_of_the_last_gradient_is_left(kind, dtype):
    """Nor of what someone has written into it."""
    layer = linear_layer(dtype)
    if kind != "linear":
        layer = MaskedConv2d(9, 17, 3, bias=False).to(dtype)
        layer.mask = torch.rand(17, 9, 3, 3) < 0.1
        layer.algorithm = "sparse"
    if kind == "channels_last":
        layer = layer.to(memory_format=torch.channels_last)
    backward(layer).fill_(float("nan"))
    gradient = backward(layer, seed=1).clone(memory_format=torch.preserve_format)
    assert gradient.stride() == layer.weight.stride()
    assert not gradient[~layer.mask].any()
    torch.testing.assert_close(gradient, expected(layer, seed=1))


@pytest.mark.parametrize(
    "hold",
    [
        lambda gradient: gradient,
        lambda gradient: gradient[3:5],
        lambda gradient: gradient.detach(),
        lambda gradient: gradient.numpy(),
        lambda gradient: gradient.untyped_storage(),
        lambda gradient: torch.from_dlpack(gradient),
    ],
    ids=["itself", "a view", "detached", "numpy", "its storage", "dlpack"],
)
def test_a_gradient_that_someone_has_is_left_alone(hold):
    layer = linear_layer()
    kept = backward(layer)
    address, was = kept.data_ptr(), kept.clone()
    held = hold(kept)
    del kept
    assert address_of_next(layer) != address
    as_tensor = torch.tensor(held) if isinstance(held, torch.UntypedStorage) else None
    if as_tensor is None:
        torch.testing.assert_close(torch.as_tensor(held), was[3:5] if held.shape[0] == 2 else was)
    del held, as_tensor
    assert address_of_next(layer) == address


def test_gradients_of_many_steps_stay_as_they_were():
    layer = linear_layer()
    gradients = [backward(layer, seed=seed) for seed in range(4)]
    for seed, gradient in enumerate(gradients):
        torch.testing.assert_close(gradient, expected(layer, seed=seed))


def test_gradients_add_up():
    layer = linear_layer()
    x = torch.randn(7, 33)
    backward(layer)
    layer.weight.grad = None
    for _ in range(3):
        layer(x).sum().backward()
    once = torch.autograd.grad(layer(x).sum(), layer.weight)[0]
    torch.testing.assert_close(layer.weight.grad, 3 * once)


def test_two_layers_that_share_a_weight():
    first, second = linear_layer(), linear_layer()
    second.weight, second.mask = first.weight, first.mask
    x = torch.randn(7, 33)
    for _ in range(2):
        first.weight.grad = None
        (first(x).sum() + second(x).sum()).backward()
        alone = torch.autograd.grad(first(x).sum(), first.weight)[0]
        torch.testing.assert_close(first.weight.grad, 2 * alone)


def test_memory_goes_with_the_layer():
    from granet_kernels.backends.cpp.index import active_weights

    layer = linear_layer()
    backward(layer)
    layer.weight.grad = None
    memory = weakref.ref(active_weights(layer.packed_mask)._memory._free[0])
    assert memory() is not None
    del layer
    gc.collect()
    assert memory() is None


def test_small_gradients_are_torchs(monkeypatch):
    from granet_kernels.backends.cpp import memory

    layer = linear_layer()
    monkeypatch.setattr(memory, "LEAST_BYTES", 31 * 33 * 4 + 1)
    assert memory.GradientMemory().like(layer.weight) is None
    monkeypatch.setattr(memory, "LEAST_BYTES", 31 * 33 * 4)
    assert memory.GradientMemory().like(layer.weight).shape == layer.weight.shape


def test_a_gradient_may_be_written_to_and_detached():
    layer = linear_layer()
    gradient = torch.autograd.grad(layer(torch.randn(7, 33)).sum(), layer.weight)[0]
    assert not gradient._is_view()
    gradient.mul_(torch.ones(1, requires_grad=True)).detach_()
