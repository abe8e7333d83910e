"""Large outputs and gradients in memory that the cpp backend keeps: nobody may notice, but by the clock."""

import gc
import threading
import weakref

import pytest
import torch

from granet_kernels import MaskedConv2d, MaskedLinear, compress, use_backend
from granet_kernels.selftest import backends_with

pytestmark = pytest.mark.skipif(
    "cpp" not in backends_with("masked_linear"), reason="the cpp backend is not built"
)


@pytest.fixture(autouse=True)
def kept_from_the_first_byte(monkeypatch):
    from granet_kernels.backends.cpp import memory

    monkeypatch.setattr(memory, "LEAST_BYTES", 1)
    monkeypatch.setattr(memory, "_shared", None)  # that of other tests' layers
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
    layer.weight.grad = None
    del held, as_tensor  # the last to be freed, and so the first to be lent
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


def test_memory_goes_with_the_last_layer():
    from granet_kernels.backends.cpp.memory import shared_memory

    first, second = linear_layer(), linear_layer()
    backward(first)
    backward(second)
    memory = weakref.ref(shared_memory())
    del first
    gc.collect()
    assert memory() is not None
    second.weight.grad = None
    block = weakref.ref(memory()._returned[0])
    del second
    gc.collect()
    assert memory() is None
    assert block() is None


def test_a_gradient_may_be_written_to_and_detached():
    layer = linear_layer()
    gradient = torch.autograd.grad(layer(torch.randn(7, 33)).sum(), layer.weight)[0]
    assert not gradient._is_view()
    gradient.mul_(torch.ones(1, requires_grad=True)).detach_()


def conv_layer(*, channels_last=False, dtype=torch.float32):
    layer = MaskedConv2d(9, 17, 3, padding=1).to(dtype)
    layer.mask = torch.rand(17, 9, 3, 3) < 0.1
    layer.algorithm = "sparse"
    return layer.to(memory_format=torch.channels_last) if channels_last else layer


def images(layer, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 9, 8, 7, generator=generator).to(layer.weight.dtype)
    if not layer.weight.is_contiguous():
        x = x.contiguous(memory_format=torch.channels_last)
    return x.requires_grad_()


def passes(layer, *, seed=0):
    """The output and the gradient of the input."""
    x = images(layer, seed=seed)
    output = layer(x)
    (gradient,) = torch.autograd.grad(output, x, output.detach().sin())
    return output.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_outputs_and_gradients_of_inputs(channels_last, dtype):
    """Whatever was in their memory before, and in the layout that they have without it."""
    layer = conv_layer(channels_last=channels_last, dtype=dtype)
    first = passes(layer)
    addresses = {tensor.data_ptr() for tensor in first}
    for tensor in first:
        tensor.fill_(float("nan"))
    del first, tensor
    again = passes(layer, seed=1)
    assert {tensor.data_ptr() for tensor in again} == addresses
    with use_backend("reference"):
        expected = passes(layer, seed=1)
    for ours, theirs in zip(again, expected, strict=True):
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs)


def test_an_output_that_someone_has_is_left_alone():
    layer = conv_layer()
    outputs = [layer(images(layer, seed=seed)) for seed in range(3)]
    for seed, output in enumerate(outputs):
        torch.testing.assert_close(output, layer(images(layer, seed=seed)))


def test_what_autograd_has_saved_is_left_alone():
    """The output of the first layer is the input of the second, and nobody else has it."""
    first, second = MaskedLinear(33, 33), MaskedLinear(33, 33)
    for layer in (first, second):
        layer.mask = torch.rand(33, 33) < 0.2
        layer.algorithm = "sparse"
    x = torch.randn(7, 33)
    gradients = []
    for backend in ("cpp", "reference"):
        with use_backend(backend):
            loss = second(first(x)).square().sum()
            for _ in range(3):
                first(torch.randn(7, 33))  # would write over it
            gradients.append(torch.autograd.grad(loss, [second.weight, first.weight]))
    torch.testing.assert_close(*gradients)


def test_gradients_through_inputs_with_gaps():
    layer = conv_layer()
    wide = torch.randn(2, 9, 8, 14)
    gradients = []
    for backend in ("cpp", "reference"):
        x = wide[..., ::2].detach().requires_grad_()
        with use_backend(backend):
            layer(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_outputs_of_a_compressed_layer():
    layer = compress(conv_layer().eval())
    layer.algorithm = "sparse"
    x = torch.randn(2, 9, 8, 7)
    with torch.inference_mode():
        first = layer(x)
        address = first.data_ptr()
        expected = first.clone()
        first.fill_(float("nan"))
        del first
        again = layer(x)
    assert again.data_ptr() == address
    assert torch.equal(again, expected)


def floats(memory, number):
    return memory.empty((number,), torch.float32, torch.contiguous_format)


def test_small_tensors_are_torchs(monkeypatch):
    from granet_kernels.backends.cpp import memory

    monkeypatch.setattr(memory, "LEAST_BYTES", 400)
    lent = memory.TensorMemory()
    assert floats(lent, 99) is None
    assert lent.like(torch.empty(3, 33)) is None
    assert floats(lent, 100).shape == (100,)
    assert lent.like(torch.empty(4, 25)).shape == (4, 25)


def test_what_fits_best_is_lent_and_nothing_twice_as_large():
    from granet_kernels.backends.cpp.memory import TensorMemory

    memory = TensorMemory()
    tensors = [floats(memory, number) for number in (301, 250, 401)]
    addresses = [tensor.data_ptr() for tensor in tensors]
    del tensors
    again = [floats(memory, number) for number in (200, 200, 200)]
    assert [tensor.data_ptr() for tensor in again[:2]] == [addresses[1], addresses[0]]
    assert again[2].data_ptr() != addresses[2]


def test_the_last_freed_of_a_size_is_lent_first():
    from granet_kernels.backends.cpp.memory import TensorMemory

    memory = TensorMemory()
    first, second = floats(memory, 100), floats(memory, 100)
    address = first.data_ptr()
    del second
    del first
    assert floats(memory, 100).data_ptr() == address


def test_no_more_is_held_than_was_lent_at_one_time():
    from granet_kernels.backends.cpp.memory import TensorMemory

    memory = TensorMemory()
    both = floats(memory, 1000), floats(memory, 300)
    del both
    for number in (100, 3000, 30, 1000, 10):
        assert floats(memory, number) is not None
        held = memory._lent + memory._bytes_free()
        assert held <= 4 * max(1300, 3000 if number != 100 else 0)
    assert memory._most == 4 * 3000


def test_nobody_waits_for_memory():
    """As a process would for ever that was forked while another thread was being lent some."""
    from granet_kernels.backends.cpp.memory import TensorMemory

    memory = TensorMemory()
    with memory._lock:
        assert floats(memory, 100) is None
        assert memory.like(torch.empty(100)) is None


def test_threads_share_the_memory():
    layers = [conv_layer() for _ in range(3)]
    with use_backend("reference"):
        expected = [[passes(layer, seed=seed) for seed in range(20)] for layer in layers]
    wrong = []

    def work(layer, theirs):
        with use_backend("cpp"):
            for seed, pair in enumerate(theirs):
                for ours, right in zip(passes(layer, seed=seed), pair, strict=True):
                    if not torch.allclose(ours, right, atol=1e-5):
                        wrong.append(seed)

    threads = [
        threading.Thread(target=work, args=both) for both in zip(layers, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
