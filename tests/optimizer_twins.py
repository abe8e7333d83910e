"""The same parameters with and without masks, for MaskedSGD and for torch.optim.SGD."""

import pytest
import torch
from torch import nn

from granet_kernels import attach_mask, available_backends, pack_mask, use_backend
from granet_kernels.layout import full_mask

SGD = torch.optim.SGD
MOMENTUM = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
# The tails of vector loops, one element, no element; the last two parameters stay without a mask.
SHAPES = ((17, 3, 3, 3), (5, 7), (1,), (0, 4), (33,), (2, 3))
MASKED = 4
EXACT = {torch.float32: torch.int32, torch.float64: torch.int64}


@pytest.fixture(autouse=True, params=[b for b in available_backends() if b in ("reference", "cpp")])
def backend(request):
    """Both compute what torch.optim.SGD does, bit for bit."""
    with use_backend(request.param):
        yield


def identical(ours, theirs):
    """Equal bit for bit: plain equality takes -0.0 for +0.0 and NaN for nothing."""
    if ours is None or theirs is None:
        return ours is theirs
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    as_integers = EXACT[ours.dtype]
    return torch.equal(
        ours.detach().contiguous().view(as_integers), theirs.detach().contiguous().view(as_integers)
    )


def generator(seed):
    return torch.Generator().manual_seed(seed)


def parameters(dtype=torch.float32, shapes=SHAPES, seed=0):
    source = generator(seed)
    return [nn.Parameter(torch.randn(s, generator=source).to(dtype)) for s in shapes]


def twins(dtype=torch.float32, masks=None):
    """The same parameters twice; of the first list the leading ones have masks, by default full."""
    ours, theirs = parameters(dtype), parameters(dtype)
    for i, param in enumerate(ours[:MASKED]):
        mask = full_mask(param.numel()) if masks is None else pack_mask(masks[i])
        attach_mask(param, mask)
    return ours, theirs


def random_masks(seed=3):
    source = generator(seed)
    return [torch.rand(shape, generator=source) < 0.4 for shape in SHAPES[:MASKED]]


def set_gradients(step, *lists):
    for params in lists:
        source = generator(100 + step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=source).to(param.dtype)


def buffers(optimizer):
    params = (param for group in optimizer.param_groups for param in group["params"])
    return [optimizer.state.get(param, {}).get("momentum_buffer") for param in params]


def assert_equal_states(ours, theirs):
    """Parameters, momenta and settings of two optimizers, bit for bit."""
    for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        settings = {k: v for k, v in mine.items() if k not in ("params", "momentum_dtype")}
        assert settings == {k: v for k, v in other.items() if k != "params"}
        for i, (param, expected) in enumerate(zip(mine["params"], other["params"], strict=True)):
            assert identical(param, expected), f"parameter {i}"
    for i, (buffer, expected) in enumerate(zip(buffers(ours), buffers(theirs), strict=True)):
        assert identical(buffer, expected), f"momentum {i}"
    assert ours.state_dict()["state"].keys() == theirs.state_dict()["state"].keys()


def train(steps, ours, theirs, mine, other):
    for step in steps:
        set_gradients(step, ours, theirs)
        mine.step()
        other.step()
        assert_equal_states(mine, other)


MOMENTA = [
    {"momentum": 0.0},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.5},
    {"momentum": 0.9, "nesterov": True},
]


def describe(options):
    names = (f"{k}={v.item() if isinstance(v, torch.Tensor) else v}" for k, v in options.items())
    tensors = ["tensor_" + k for k, v in options.items() if isinstance(v, torch.Tensor)]
    return "-".join([*names, *tensors])
