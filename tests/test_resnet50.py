"""A real network: torchvision's ResNet-50, sparsified."""

import copy

import pytest
import torch
import torchvision

from granet import GraNet
from granet.flops import measure
from granet_kernels import MaskedSGD, masked_layers, sparsify, use_backend

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def reference_backend():
    with use_backend("reference"):
        yield


@pytest.fixture(scope="module")
def dense_state():
    torch.manual_seed(0)
    return torchvision.models.resnet50().state_dict()


@pytest.fixture
def model(dense_state):
    model = sparsify(torchvision.models.resnet50())
    model.load_state_dict(dense_state, strict=True)
    return model


def step(model, optimizer):
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    loss = torch.nn.functional.cross_entropy(model(x), torch.tensor([3, 5]))
    loss.backward()
    optimizer.step()
    return loss.item()


def same_state(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(
        torch.equal(value, right[name]) for name, value in left.items()
    )


def test_has_the_layers_of_the_paper(model):
    layers = masked_layers(model).values()
    assert len(layers) == 54
    assert sum(layer.weight.numel() for layer in layers) == 25_502_912
    assert all(layer.sparsity == 0 for layer in layers)


def test_trains_an_update_and_round_trips(model):
    optimizer = MaskedSGD(model.parameters(), lr=1e-4, momentum=0.9)
    sparsifier = GraNet(
        model,
        optimizer,
        sparsity=0.9,
        initial_sparsity=0.0,
        total_steps=4,
        update_every=1,
        prune_until=1,
    )
    assert step(model, optimizer) > 0
    assert sparsifier.step()
    assert sum(sparsifier.active_counts()) == 25_502_912 - round(25_502_912 * 0.9)

    other = sparsify(torchvision.models.resnet50())
    other.load_state_dict(model.state_dict(), strict=True)
    assert same_state(other, model)

    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert twin.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert same_state(twin, model)  # checkpoints do not depend on the memory format
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(twin.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-4)


def test_compiles_without_a_graph_break(model):
    """With the backend that traces as Inductor does, forward and backward, but generates no code."""
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    twin = copy.deepcopy(model)
    optimizer = MaskedSGD(model.parameters(), lr=0.01)
    assert step(compiled, optimizer) == pytest.approx(
        step(twin, MaskedSGD(twin.parameters(), lr=0.01)), rel=1e-5
    )
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=name)


def test_flops_are_those_of_the_dense_network(model):
    flops = measure(model, (3, 224, 224))
    assert sum(flops.values()) == sum(
        measure(torchvision.models.resnet50(), (3, 224, 224)).values()
    )
    assert sum(flops.values()) == pytest.approx(8.178e9, rel=1e-3)
    assert set(flops) == set(masked_layers(model))
