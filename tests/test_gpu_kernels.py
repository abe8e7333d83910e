"""The backends on a GPU: the operators' tests, streams, devices, memory, synchronisation.

What a test computes is small and said on the device; that it runs at all without a GPU is tested by
``triton_interpreted.py`` and its neighbours.
"""

import copy
import os
import subprocess
import sys

import pytest
import torch

from granet_kernels import MaskedSGD, pack_mask
from granet_kernels.backends import reference
from granet_kernels.layout import full_mask
from tests.gpu_states import (
    GPU,
    OPS,
    SGD,
    State,
    Training,
    assert_equal,
    backend,
    no_waiting,
    run_all,
)

__all__ = ["backend"]

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mask", "sgd", "select", "update_operator"])
def test_the_operators_tests(family, backend):
    """The same bodies, with tensors made on the GPU."""
    chosen = {"GRANET_TEST_DEVICE": GPU, "GRANET_TEST_BACKENDS": backend}
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
        state.averaged_step(lr=0.3, average_decay=0.9)
        state.step(**scalars)
        run_all(state)
        fresh = [torch.empty_like(grad).copy_(grad) for grad in state.grads]
        OPS.masked_sgd_(state.weights, fresh, state.momenta, state.masks, **SGD)  # moved


def test_a_whole_step_does_not_wait():
    training = Training()
    for _ in range(2):
        training.step()
    with no_waiting():
        training.step()


def test_infinite_gradients_change_nothing_without_waiting():
    state = State()
    before = [tensor.clone() for tensor in state.tensors()]
    found = torch.tensor(1.0, device=GPU)
    with no_waiting():
        state.step(found_inf=found, grad_scale=torch.full((), 2.0, device=GPU))
        state.averaged_step(found_inf=found)
    assert_equal(state.tensors(), before)


def test_repeats_bit_for_bit():
    states = [State() for _ in range(3)]
    results = [run_all(state) for state in states]
    for state, result in zip(states[1:], results[1:], strict=True):
        for a, b in zip(
            [*state.tensors(), *result], [*states[0].tensors(), *results[0]], strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)  # the other one is compiled already
def test_nothing_compiles_anew_for_other_lengths_and_numbers(backend):
    import triton

    state = State()
    run_all(state)
    compiled = []
    other = State(sizes=(16, 4097, 24, 65536, 8), seed=1)
    before = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = lambda **made: compiled.append(made["src"].name)
    try:
        other.step(lr=1.0, weight_decay=0.5, momentum=0.1)
        other.step(lr=0.5)
        other.averaged_step(lr=0.5, average_decay=0.2)
        OPS.prune_(other.weights, other.masks, torch.tensor([1], device=GPU), other.momenta)
    finally:
        triton.knobs.compilation.listener = before
    assert compiled == []


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
