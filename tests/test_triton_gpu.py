"""The Triton backend on a GPU: the operators' tests, graphs, streams, devices, memory, synchronisation.

What a test computes is small and said on the device; that it runs at all without a GPU is tested by
``triton_interpreted.py`` and its neighbours.
"""

import contextlib
import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from granet_kernels import MaskedSGD, count_active, masked_layers, pack_mask, sparsify
from granet_kernels.backends import reference
from granet_kernels.layout import full_mask, packed_length

triton = pytest.importorskip("triton")

pytestmark = pytest.mark.gpu

GPU = "cuda"
OPS = torch.ops.granet
SGD = {
    "lr": 0.1,
    "momentum": 0.9,
    "dampening": 0.0,
    "weight_decay": 1e-4,
    "nesterov": True,
    "maximize": False,
    "first": False,
}
SIZES = (4096 + 40, 33, 8, 1, 20480, 1009)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def kernels_are_triton():
    """Everything here is about this backend; another one must not pass its tests."""
    from granet_kernels.ops import backend_for

    if torch.cuda.is_available():
        assert backend_for("masked_sgd_", "cuda") == "triton"


@contextlib.contextmanager
def no_waiting():
    """Whoever waits for the device in here raises."""
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mask", "sgd", "select"])
def test_the_operators_tests(family):
    """The same bodies, with tensors made on the GPU."""
    chosen = {"GRANET_TEST_DEVICE": GPU, "GRANET_TEST_BACKENDS": "triton"}
    file = os.path.join(os.path.dirname(__file__), f"test_{family}.py")
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "-o", "addopts="]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", file, *options, "--import-mode=append"],
        capture_output=True,
        text=True,
        env=os.environ | chosen,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


class State:
    """Weights, gradients, momenta and masks of several sizes, the same for the same seed."""

    def __init__(self, dtype=torch.float32, device=None, seed=0, sizes=SIZES):
        device = device or GPU
        g = torch.Generator().manual_seed(seed)
        self.weights, self.grads, self.momenta = (
            [torch.randn(n, generator=g).to(device, dtype) for n in sizes] for _ in range(3)
        )
        bools = [torch.rand(n, generator=g) < 0.3 for n in sizes]
        self.masks = [reference.pack_mask(mask).to(device) for mask in bools]
        reference.zero_inactive_(self.weights, self.masks)
        reference.zero_inactive_(self.momenta, self.masks)
        total = sum(sizes)
        self.k = torch.tensor([total // 5], device=device)
        self.fraction = torch.tensor(0.3, dtype=torch.float64, device=device)

    def step(self, ops=OPS, **options):
        ops.masked_sgd_(self.weights, self.grads, self.momenta, self.masks, **(SGD | options))

    def update(self, ops=OPS):
        ops.prune_(self.weights, self.masks, self.k, self.momenta)
        ops.drop_regrow_(self.weights, self.masks, self.grads, self.fraction, self.momenta)

    def other_operators(self, ops=OPS):
        """The rest, for their results."""
        weight, mask = self.weights[0], self.masks[0]
        flag = torch.tensor(True, device=weight.device)
        bools = ops.unpack_mask(mask, weight.numel())
        square = weight.view(-1, 8)  # a gradient whose strides are not its weight's
        turned = torch.zeros_like(square.t()).copy_(square.t()).t()
        return [
            ops.mask_cast(weight, mask, torch.bfloat16),
            ops.mask_grad(self.grads[0], weight, mask, flag),
            ops.mask_grad(turned, square, mask, ~flag),
            bools,
            ops.pack_mask(bools),
            ops.count_active(self.masks),
            *ops.topk_mask(self.grads, self.k),
        ]

    def tensors(self):
        return [*self.weights, *self.momenta, *self.masks]


def assert_equal(ours, expected):
    """Masks bit for bit, numbers as closely as one rounding."""
    for a, b in zip(ours, expected, strict=True):
        if a.is_floating_point():
            torch.testing.assert_close(a, b, check_device=False)
        else:
            assert torch.equal(a.cpu(), b.cpu())


def run_all(state, ops=OPS):
    state.step(ops)
    state.update(ops)
    return state.other_operators(ops)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_once(dtype):
    """Also what a memory checker is given: few elements, sizes that fill no block."""
    ours, expected = State(dtype), State(dtype)
    results, wanted = run_all(ours), run_all(expected, reference)
    assert_equal(results, wanted)
    assert_equal(ours.tensors(), expected.tensors())


def test_unaligned_memory():
    memory = State(sizes=(4097, 4097))
    ours, expected = ([t.clone() for t in memory.weights] for _ in range(2))
    mask = full_mask(4096, device=GPU)
    OPS.masked_sgd_([ours[0][1:]], [memory.grads[0][1:]], [ours[1][1:]], [mask], **SGD)
    of_expected = [t[1:] for t in expected]
    reference.masked_sgd_(of_expected[:1], [memory.grads[0][1:]], of_expected[1:], [mask], **SGD)
    assert_equal(ours, expected)


def test_nothing_waits():
    state = State()
    run_all(state)  # compiled, and its tables written
    scalars = {
        "lr_tensor": torch.tensor(0.05, device=GPU),
        "grad_scale": torch.tensor(2.0, device=GPU),
        "found_inf": torch.tensor(0.0, device=GPU),
    }
    state.step(**scalars)
    with no_waiting():
        state.step(lr=0.3, weight_decay=0.2)
        state.step(**scalars)
        run_all(state)
        fresh = [torch.empty_like(grad).copy_(grad) for grad in state.grads]
        OPS.masked_sgd_(state.weights, fresh, state.momenta, state.masks, **SGD)  # moved


def test_infinite_gradients_change_nothing_without_waiting():
    state = State()
    before = [tensor.clone() for tensor in state.tensors()]
    found = torch.tensor(1.0, device=GPU)
    with no_waiting():
        state.step(found_inf=found, grad_scale=torch.full((), 2.0, device=GPU))
    assert_equal(state.tensors(), before)


def test_repeats_bit_for_bit():
    states = [State() for _ in range(3)]
    results = [run_all(state) for state in states]
    for state, result in zip(states[1:], results[1:], strict=True):
        for a, b in zip(
            [*state.tensors(), *result], [*states[0].tensors(), *results[0]], strict=True
        ):
            assert torch.equal(a, b)


def test_nothing_compiles_anew_for_other_lengths_and_numbers():
    state = State()
    run_all(state)
    compiled = []
    other = State(sizes=(16, 4097, 24, 65536, 8), seed=1)
    before = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = lambda **made: compiled.append(made["src"].name)
    try:
        other.step(lr=1.0, weight_decay=0.5, momentum=0.1)
        other.step(lr=0.5)
        OPS.prune_(other.weights, other.masks, torch.tensor([1], device=GPU), other.momenta)
    finally:
        triton.knobs.compilation.listener = before
    assert compiled == []


# --- CUDA graphs ----------------------------------------------------------------------------------


def captured(work, warm_up=3):
    """A graph of ``work``, warmed up beside the current stream as torch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


@pytest.mark.parametrize("warm_up", [0, 2])
def test_operators_in_a_graph(warm_up):
    """Without a warm-up too: tables of a graph are its own, and kernels may be compiled meanwhile."""
    compiled = State(seed=9)
    run_all(compiled)
    ours, expected = State(), State()

    def work():
        ours.step()
        ours.update()

    graph = captured(work, warm_up)
    for _ in range(warm_up):
        expected.step(reference)
        expected.update(reference)
    for k in (9000, 4000, 1):
        ours.k.fill_(k)
        expected.k.fill_(k)
        graph.replay()
        expected.step(reference)
        expected.update(reference)
        assert_equal(ours.tensors(), expected.tensors())


def test_two_graphs_of_the_same_tensors():
    """The second one's tables are not the first one's, whose memory may be gone."""
    state = State()
    before = [tensor.clone() for tensor in state.tensors()]
    first = captured(state.step)
    second = captured(state.step)
    del first
    torch.empty(1 << 22, device=GPU).fill_(7.0)  # where the first graph's memory may have been
    for tensor, value in zip(state.tensors(), before, strict=True):
        tensor.copy_(value)
    second.replay()
    expected = State()
    expected.step(reference)
    assert_equal(state.tensors(), expected.tensors())


class Training:
    """A network, its optimizer and an update, all that one step of sparse training does."""

    def __init__(self):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 8 * 8, 10),
        )
        self.model = sparsify(model).to(GPU, memory_format=torch.channels_last)
        self.layers = list(masked_layers(self.model).values())
        for layer in self.layers:
            layer.mask = torch.rand(layer.weight.shape, device=GPU) < 0.5
            layer.dense_grad.fill_(True)  # the update regrows by the gradient of inactive weights
        self.optimizer = MaskedSGD(
            self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4
        )
        self.x = torch.randn(8, 3, 16, 16, device=GPU)
        self.y = torch.randint(10, (8,), device=GPU)
        self.k = torch.tensor([5000], device=GPU)
        self.fraction = torch.tensor(0.3, dtype=torch.float64, device=GPU)
        self.loss = torch.zeros((), device=GPU)

    def step(self):
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        self.loss.copy_(loss.detach())
        self.optimizer.step()
        weights = [layer.weight for layer in self.layers]
        masks = [layer.packed_mask for layer in self.layers]
        momenta = [self.optimizer.momentum_of(weight) for weight in weights]
        with torch.no_grad():
            OPS.prune_(weights, masks, self.k, momenta)
            grads = [weight.grad for weight in weights]
            OPS.drop_regrow_(weights, masks, grads, self.fraction, momenta)


def test_a_whole_step_with_an_update_in_a_graph(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    ours = Training()
    graph = captured(ours.step)
    twin = Training()
    for _ in range(3):
        twin.step()
    for k in (4000, 3000, 2000):
        x = torch.randn(8, 3, 16, 16, device=GPU)
        for training in (ours, twin):
            training.x.copy_(x)
            training.k.fill_(k)
        graph.replay()
        twin.step()
        counts = count_active([layer.packed_mask for layer in ours.layers])
        assert int(counts.sum()) == k
        torch.testing.assert_close(ours.loss, twin.loss, rtol=1e-2, atol=1e-3)
        for layer in ours.layers:
            assert not layer.weight[~layer.mask].any()
            assert layer.weight.isfinite().all()
    for a, b in zip(ours.layers, twin.layers, strict=True):
        agree = (a.mask == b.mask).float().mean()  # sums in another order may swap close neighbours
        assert agree > 0.99


def test_a_whole_step_does_not_wait():
    training = Training()
    for _ in range(2):
        training.step()
    with no_waiting():
        training.step()


# --- streams and devices --------------------------------------------------------------------------


def test_runs_on_the_current_stream():
    """Behind work that takes long: on another stream it would have read what was there before."""
    expected = State()
    expected.step(reference)
    state = State()
    right = [grad.clone() for grad in state.grads]
    for grad in state.grads:
        grad.fill_(1e9)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for grad, value in zip(state.grads, right, strict=True):
            grad.copy_(value)
        state.step()
    side.synchronize()
    assert_equal(state.tensors(), expected.tensors())


def test_a_table_made_on_one_stream_serves_another():
    state, expected = State(), State()
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(5_000_000)
            state.step()
        stream.synchronize()
        expected.step(reference)
    assert_equal(state.tensors(), expected.tensors())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_on_the_second_device():
    """While another one is current; nothing is left on that."""
    ours, expected = State(device="cuda:1"), State(device="cuda:1")
    assert torch.cuda.current_device() == 0
    results, wanted = run_all(ours), run_all(expected, reference)
    assert torch.cuda.current_device() == 0
    assert all(result.device == torch.device("cuda:1") for result in results)
    assert_equal(results, wanted)
    assert_equal(ours.tensors(), expected.tensors())


# --- many elements --------------------------------------------------------------------------------

MANY = 2**31 + 8 * 1000 + 5
EDGE = 4096


def enough_memory(needed):
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory")


def ends(tensor, step=1):
    """The first elements, some around 2^31, the last ones (all beginning at a mask's byte)."""
    last = (tensor.numel() - EDGE // step) // 8 * 8
    middle = 2**31 // step - EDGE // 2
    return [tensor[:EDGE], tensor[middle : middle + EDGE], tensor[last:]]


def ends_of_mask(mask):
    return [reference.pack_mask(bits) for bits in ends(reference_bits(mask))]


def reference_bits(mask):
    """bool, (MANY,), by torch alone and chunk by chunk."""
    bits = torch.empty(8 * mask.numel(), dtype=torch.bool, device=mask.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    for start in range(0, mask.numel(), 1 << 24):
        part = mask[start : start + (1 << 24)]
        bits[8 * start : 8 * start + 8 * part.numel()] = (
            (part[:, None] >> shifts & 1).bool().flatten()
        )
    return bits[:MANY]


def many_bits():
    """A random mask of MANY elements, its padding zero."""
    mask = torch.randint(0, 256, (packed_length(MANY),), dtype=torch.uint8, device=GPU)
    mask[MANY // 8] = 0b10101
    mask[MANY // 8 + 1 :] = 0
    return mask


@pytest.mark.slow
def test_step_of_more_than_2_to_the_31_elements():
    enough_memory(24 << 30)
    mask = many_bits()
    param, grad, momentum = (
        torch.empty(MANY, dtype=torch.bfloat16, device=GPU).normal_() for _ in range(3)
    )
    expected = [[part.clone() for part in ends(tensor)] for tensor in (param, grad, momentum)]
    masks = ends_of_mask(mask)
    reference.masked_sgd_(*expected, masks, **SGD)
    OPS.masked_sgd_([param], [grad], [momentum], [mask], **SGD)
    assert_equal(ends(param), expected[0])
    assert_equal(ends(momentum), expected[2])


@pytest.mark.slow
def test_masks_of_more_than_2_to_the_31_elements():
    enough_memory(24 << 30)
    mask = many_bits()
    bits = reference_bits(mask)
    assert int(OPS.count_active([mask])) == int(bits.sum(dtype=torch.int64))
    unpacked = OPS.unpack_mask(mask, MANY)
    assert torch.equal(unpacked, bits)
    del unpacked
    assert torch.equal(OPS.pack_mask(bits), mask)
    weight = torch.ones(MANY, dtype=torch.bfloat16, device=GPU)
    cast = OPS.mask_cast(weight, mask, torch.float16)
    assert_equal(ends(cast), [part.half() for part in ends(bits)])
    del cast
    OPS.zero_inactive_([weight], [mask])
    assert_equal(ends(weight), [part.bfloat16() for part in ends(bits)])
    assert int(weight.count_nonzero()) == int(bits.sum(dtype=torch.int64))


@pytest.mark.slow
def test_selection_of_more_than_2_to_the_31_elements():
    """Equal magnitudes all through but for a few at the very end: those stay, then the first."""
    enough_memory(24 << 30)
    weight = torch.full((MANY,), 0.5, dtype=torch.bfloat16, device=GPU)
    mask = full_mask(MANY, device=GPU)
    weight[-3:] = 2.0
    k = torch.tensor([1003], device=GPU)
    (chosen,) = OPS.topk_mask([weight], k)
    OPS.prune_([weight], [mask], k, [])
    assert torch.equal(chosen, mask)
    assert int(OPS.count_active([mask])) == 1003
    assert int(weight.count_nonzero()) == 1003
    assert weight[-3:].tolist() == [2.0] * 3
    assert weight[:1000].eq(0.5).all()
    score = torch.zeros(MANY, dtype=torch.bfloat16, device=GPU)
    score[-100:-3] = 1.0
    fraction = torch.tensor(96.5 / 1003, dtype=torch.float64, device=GPU)  # 97 of 1003
    OPS.drop_regrow_([weight], [mask], [score], fraction, [])
    bits = reference_bits(mask)
    assert int(bits.sum(dtype=torch.int64)) == 1003
    assert bits[-100:].all()
    assert bits[: 1000 - 97].all()


def test_copies_of_a_model_have_tables_of_their_own():
    training = Training()
    training.step()
    twin = copy.deepcopy(training.model)
    optimizer = MaskedSGD(twin.parameters(), lr=0.05)
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    twin(training.x).sum().backward()
    optimizer.step()
    for parameter, value in zip(training.model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)


def test_a_packed_mask_is_that_of_the_reference():
    bits = torch.rand(1009, device=GPU) < 0.5
    assert torch.equal(pack_mask(bits), reference.pack_mask(bits))
