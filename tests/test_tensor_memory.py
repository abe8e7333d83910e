"""Large outputs and gradients in memory that the cpp backend keeps: nobody may notice, but by the clock."""

import gc
import threading
import weakref
from collections import deque
from types import SimpleNamespace

import pytest
import torch

from granet_kernels import MaskedConv2d, MaskedLinear, compress, use_backend

memory = pytest.importorskip("granet_kernels.backends.cpp.memory", exc_type=ImportError)


@pytest.fixture(autouse=True)
def kept_from_the_first_byte(monkeypatch):
    monkeypatch.setattr(memory, "LEAST_BYTES", 1)
    monkeypatch.setattr(memory, "_shared", None)  # that of other tests' layers
    with use_backend("cpp"):
        yield


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """The blocks that a test has come to need. It is about nothing if there are none."""
    needed = []

    class Noted(memory._Block):
        __slots__ = ()

        def __init__(self, size):
            super().__init__(size)
            needed.append(size)

    monkeypatch.setattr(memory, "_Block", Noted)
    seen = []
    yield SimpleNamespace(clear=lambda: seen.extend(needed) or needed.clear(), blocks=needed)
    assert seen or needed


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
    first, second = linear_layer(), linear_layer()
    backward(first)
    backward(second)
    shared = weakref.ref(memory.shared_memory())
    del first
    gc.collect()
    assert shared() is not None
    second.weight.grad = None
    numbers = weakref.ref(shared()._free[0].memory)
    del second
    gc.collect()
    assert shared() is None
    assert numbers() is None


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


def test_outputs_of_a_compressed_layer(fresh):
    layer = compress(conv_layer().eval())
    layer.algorithm = "sparse"
    x = torch.randn(2, 9, 8, 7)
    with torch.inference_mode():
        first = layer(x)
        expected = first.clone()
        first.fill_(float("nan"))
        del first
        again = layer(x)
    assert len(fresh.blocks) == 1
    assert torch.equal(again, expected)


def floats(memory, number):
    return memory.empty((number,), torch.float32, torch.contiguous_format)


def test_small_tensors_are_torchs(monkeypatch):
    monkeypatch.setattr(memory, "LEAST_BYTES", 400)
    lent = memory.TensorMemory()
    assert floats(lent, 99) is None
    assert lent.like(torch.empty(3, 33)) is None
    assert floats(lent, 100).shape == (100,)
    assert lent.like(torch.empty(4, 25)).shape == (4, 25)


def test_what_fits_best_is_lent_and_nothing_more_than_twice_as_large():
    lent = memory.TensorMemory()
    tensors = [floats(lent, number) for number in (301, 250, 401)]
    addresses = [tensor.data_ptr() for tensor in tensors]
    del tensors
    again = [floats(lent, number) for number in (200, 200, 200)]
    assert [tensor.data_ptr() for tensor in again[:2]] == [addresses[1], addresses[0]]
    assert again[2].data_ptr() != addresses[2]


def test_the_last_freed_of_a_size_is_lent_first():
    lent = memory.TensorMemory()
    first, second = floats(lent, 100), floats(lent, 100)
    address = first.data_ptr()
    del second
    del first
    assert floats(lent, 100).data_ptr() == address


# Elements of the tensors of a step, each freed when the next two are there, or after the last one.
CHAINS = {
    "alternating": [1000, 3000],
    "resnet": [802, 802, 205, 205, 802, 205, 205, 802, 411, 103, 411, 103, 103, 411, 206, 51, 206],
}


@pytest.mark.parametrize("saved", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_steps_that_repeat_need_nothing_new(chain, saved, fresh):
    lent = memory.TensorMemory()

    def step():
        alive = deque(maxlen=None if saved else 2)
        alive.extend(floats(lent, number) for number in chain)

    step()
    fresh.clear()
    for _ in range(5):
        step()
    assert not fresh.blocks
    assert sum(block.bytes for block in lent._free) <= 4 * sum(chain)


def test_a_tensor_that_grows_leaves_nothing_behind():
    lent = memory.TensorMemory()
    for number in range(100, 400, 7):
        floats(lent, number)
    assert [block.bytes for block in lent._free] == [4 * 394]


def test_what_is_not_used_goes():
    lent = memory.TensorMemory()
    big = [floats(lent, 1000) for _ in range(3)]
    del big
    for _ in range(memory.LONGEST_IDLE - 2):
        floats(lent, 100)
    assert len(lent._free) == 3 + 1
    for _ in range(3):
        floats(lent, 100)
    assert [block.bytes for block in lent._free] == [400]


def test_without_memory_the_free_blocks_go(monkeypatch):
    lent = memory.TensorMemory()
    floats(lent, 100)

    def fail(size):
        raise RuntimeError("can't allocate memory")

    with monkeypatch.context() as context:
        context.setattr(memory, "_Block", fail)
        with pytest.raises(RuntimeError, match="can't allocate"):
            floats(lent, 1000)
    assert not lent._free
    assert floats(lent, 1000).shape == (1000,)


def test_a_loan_outlives_the_memory():
    lent = memory.TensorMemory()
    tensor = floats(lent, 100).fill_(3)
    del lent
    gc.collect()
    assert tensor.sum() == 300


def test_a_loan_in_shared_memory(fresh):
    lent = memory.TensorMemory()
    tensor = floats(lent, 100).fill_(3)
    tensor.share_memory_()  # it moves, and its block is free
    floats(lent, 100).fill_(7)
    assert len(fresh.blocks) == 1
    assert tensor.sum() == 300


def test_what_a_loan_cannot_do():
    tensor = floats(memory.TensorMemory(), 100)
    with pytest.raises(RuntimeError, match="not resizable"):
        tensor.resize_(1000)


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
