"""What only a GPU can show: the layers, the optimizer and the engine on CUDA."""

import copy

import pytest
import torch
from torch import nn

from granet import GraNet
from granet_kernels import MaskedSGD, attached_mask, masked_layers, sparsify

pytestmark = pytest.mark.gpu


def network():
    return sparsify(
        nn.Sequential(
            nn.Conv2d(3, 16, 3),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3),
            nn.Flatten(),
            nn.Linear(256, 10),
        )
    )


def test_masks_move_with_the_model():
    model = network()
    masks = {
        name: torch.rand(layer.weight.shape) < 0.3 for name, layer in masked_layers(model).items()
    }
    for name, layer in masked_layers(model).items():
        layer.mask = masks[name]
    model = model.to("cuda", memory_format=torch.channels_last)
    for name, layer in masked_layers(model).items():
        assert layer.packed_mask.is_cuda
        assert attached_mask(layer.weight) is layer.packed_mask
        assert torch.equal(layer.mask.cpu(), masks[name])
        assert not layer.weight[~layer.mask].any()
    on_cpu = copy.deepcopy(model).cpu()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        torch.testing.assert_close(model(x.cuda()).cpu(), on_cpu(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_trains_to_exactly_the_target(amp_dtype, memory_format, scope):
    model = network().to("cuda", memory_format=memory_format)
    optimizer = MaskedSGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    sparsifier = GraNet(
        model,
        optimizer,
        sparsity=0.9,
        initial_sparsity=0.5,
        total_steps=60,
        update_every=5,
        scope=scope,
    )
    scaler = torch.amp.GradScaler("cuda", enabled=amp_dtype == torch.float16)
    while sparsifier.steps < 60:
        x, y = torch.randn(8, 3, 8, 8, device="cuda"), torch.randint(10, (8,), device="cuda")
        with torch.autocast("cuda", dtype=amp_dtype, enabled=amp_dtype is not None):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        sparsifier.step()
        optimizer.zero_grad()
    assert sum(sparsifier.active_counts()) == sparsifier.target_active
    for layer in sparsifier.layers.values():
        assert layer.weight.isfinite().all()
        assert not layer.weight[~layer.mask].any()
        assert not optimizer.momentum_of(layer.weight)[~layer.mask].any()


def test_all_ones_masks_equal_torch_on_the_gpu():
    dense = nn.Conv2d(8, 8, 3, padding=1).cuda()
    masked = sparsify(copy.deepcopy(dense))
    ours = MaskedSGD(masked.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    theirs = torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    for _ in range(5):
        x = torch.randn(4, 8, 9, 9, device="cuda")
        for layer, optimizer in ((dense, theirs), (masked, ours)):
            layer(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(masked.weight, dense.weight, rtol=1e-4, atol=1e-5)


def test_compiled_model_on_the_gpu():
    model = network().cuda()
    x = torch.randn(4, 3, 8, 8, device="cuda")
    torch.compile(model, fullgraph=True)(x).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
