"""Tensors and a network on a GPU, of the tests of the backends there."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from granet_kernels import MaskedSGD, masked_layers, sparsify
from granet_kernels.backends import reference
from granet_kernels.ops import backend_for, backend_status, use_backend

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


@pytest.fixture(autouse=True, params=["cuda", "triton"])
def backend(request):
    """The one whose kernels run; another one must not pass its tests."""
    if reason := backend_status()[request.param]:
        pytest.skip(f"{request.param}: {reason}")
    with use_backend(request.param):
        if torch.cuda.is_available():
            assert backend_for("masked_sgd_", GPU) == request.param
        yield request.param


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


class State:
    """Weights, gradients, momenta, averages and masks of several sizes, the same for the same seed."""

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
        wider = torch.promote_types(dtype, torch.float32)
        self.averages = [torch.zeros_like(weight, dtype=wider) for weight in self.weights]
        total = sum(sizes)
        self.k = torch.tensor([total // 5], device=device)
        self.fraction = torch.tensor(0.3, dtype=torch.float64, device=device)

    def step(self, ops=OPS, **options):
        ops.masked_sgd_(self.weights, self.grads, self.momenta, self.masks, **(SGD | options))

    def averaged_step(self, ops=OPS, **options):
        """With a rate of zero: two backends may round a weight of 16 bits to either side."""
        averages = {"averages": self.averages, "average_decay": 0.75, "lr": 0.0}
        self.step(ops, **(averages | options))

    def update(self, ops=OPS):
        ops.prune_(self.weights, self.masks, self.k, self.momenta)
        ops.drop_regrow_(self.weights, self.masks, self.grads, self.fraction, self.momenta)

    def other_operators(self, ops=OPS):
        """The rest, for their results."""
        weight, mask = self.weights[0], self.masks[0]
        flag = torch.ones((), dtype=torch.bool, device=weight.device)  # torch.tensor would wait
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
        return [*self.weights, *self.momenta, *self.averages, *self.masks]


def assert_equal(ours, expected):
    """Masks bit for bit, numbers as closely as one rounding."""
    for a, b in zip(ours, expected, strict=True):
        if a.is_floating_point():
            torch.testing.assert_close(a, b, check_device=False)
        else:
            assert torch.equal(a.cpu(), b.cpu())


def run_all(state, ops=OPS):
    state.averaged_step(ops)
    state.step(ops)
    state.update(ops)
    return state.other_operators(ops)


class Training:
    """A network, its average, its optimizer and an update, all that one step of sparse training does."""

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
        self.average = copy.deepcopy(self.model)
        self.optimizer.average_into(self.average.parameters(), 0.5)
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
            grads = [weight.grad for weight in weights]
            OPS.prune_drop_regrow_(weights, masks, grads, self.k, self.fraction, momenta)
