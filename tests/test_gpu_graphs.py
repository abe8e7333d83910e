"""The backends in CUDA graphs."""

import pytest
import torch

from granet_kernels import count_active
from granet_kernels.backends import reference
from tests.gpu_states import GPU, State, Training, assert_equal, backend, run_all

__all__ = ["backend"]

pytestmark = pytest.mark.gpu


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
        ours.averaged_step(lr=0.1)
        ours.step()
        ours.update()

    graph = captured(work, warm_up)
    for _ in range(warm_up):
        expected.averaged_step(reference, lr=0.1)
        expected.step(reference)
        expected.update(reference)
    for k in (9000, 4000, 1):
        ours.k.fill_(k)
        expected.k.fill_(k)
        graph.replay()
        expected.averaged_step(reference, lr=0.1)
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
        before = [param.clone() for param in ours.average.parameters()]
        graph.replay()
        twin.step()
        for average, old in zip(ours.average.parameters(), before, strict=True):
            assert average.isfinite().all()
            assert not torch.equal(average, old)
        counts = count_active([layer.packed_mask for layer in ours.layers])
        assert int(counts.sum()) == k
        torch.testing.assert_close(ours.loss, twin.loss, rtol=1e-2, atol=1e-3)
        for layer in ours.layers:
            assert not layer.weight[~layer.mask].any()
            assert layer.weight.isfinite().all()
    for a, b in zip(ours.layers, twin.layers, strict=True):
        agree = (a.mask == b.mask).float().mean()  # sums in another order may swap close neighbours
        assert agree > 0.99
