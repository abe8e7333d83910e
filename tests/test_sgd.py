"""masked_sgd_ by hand and against torch.optim.SGD, on every backend."""

import re

import pytest
import torch

from granet_kernels import pack_mask, use_backend
from granet_kernels.backends import reference
from granet_kernels.layout import full_mask
from granet_kernels.selftest import backends_with
from tests.helpers import FP64, NAN, bits, mask_of

PLAIN = {
    "lr": 0.5,
    "momentum": 0.0,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "maximize": False,
    "first": False,
}


@pytest.fixture(params=backends_with("masked_sgd_"), autouse=True)
def backend(request):
    with use_backend(request.param):
        yield request.param


def step(params, grads, momenta, masks, **options):
    torch.ops.granet.masked_sgd_(params, grads, momenta, masks, **(PLAIN | options))


def test_by_hand():
    """w = 2, g = 1, v = 4: v' = 0.5 * 4 + (1 - 0.25) * (1 + 0.5 * 2) = 3.5; w' = 2 - 0.5 * 3.5."""
    weight, momentum = torch.tensor([2.0, 2.0]), torch.tensor([4.0, 4.0])
    mask = pack_mask(mask_of(1, 0))
    options = {"momentum": 0.5, "dampening": 0.25, "weight_decay": 0.5}
    step([weight], [torch.tensor([1.0, NAN])], [momentum], [mask], **options)
    assert bits(momentum) == bits([3.5, 4.0])
    assert bits(weight) == bits([0.25, 2.0])


def test_nesterov_by_hand():
    """v' = 0.5 * 4 + 1 = 3; w' = 2 - 0.5 * (1 + 0.5 * 3)."""
    weight, momentum = torch.tensor([2.0]), torch.tensor([4.0])
    step([weight], [torch.ones(1)], [momentum], [full_mask(1)], momentum=0.5, nesterov=True)
    assert bits(momentum) == bits([3.0])
    assert bits(weight) == bits([0.75])


def test_first_step_takes_the_gradient_as_momentum():
    weight, momentum = torch.tensor([2.0]), torch.tensor([99.0])
    step(
        [weight],
        [torch.ones(1)],
        [momentum],
        [full_mask(1)],
        momentum=0.5,
        dampening=0.5,
        first=True,
    )
    assert bits(momentum) == bits([1.0])
    assert bits(weight) == bits([1.5])


def test_infinite_gradients_change_nothing():
    weight, momentum = torch.tensor([2.0]), torch.tensor([4.0])
    scaler = {"grad_scale": torch.tensor(8.0), "found_inf": torch.tensor(1.0)}
    step([weight], [torch.tensor([NAN])], [momentum], [full_mask(1)], momentum=0.5, **scaler)
    assert (weight.item(), momentum.item()) == (2.0, 4.0)


def test_gradients_are_unscaled_and_left_alone():
    weight, grad = torch.tensor([2.0]), torch.tensor([8.0])
    step(
        [weight],
        [grad],
        [],
        [full_mask(1)],
        grad_scale=torch.tensor(8.0),
        found_inf=torch.tensor(0.0),
    )
    assert (weight.item(), grad.item()) == (1.5, 8.0)


def test_half_precision_is_computed_in_fp32():
    """bf16 has 8 bits: w and v are rounded once, from fp32 results."""
    weight = torch.tensor([1.0], dtype=torch.bfloat16)
    momentum = torch.tensor([1.0], dtype=torch.bfloat16)
    grad = torch.tensor([2.0**-7], dtype=torch.bfloat16)
    step(
        [weight], [grad], [momentum], [full_mask(1)], lr=2.0**-7, momentum=1.0, weight_decay=2.0**-8
    )
    exact = 1 + 2.0**-7 + 2.0**-8  # 3/256 above 1: between two bf16 values
    assert momentum.item() == torch.tensor(exact).bfloat16().item()
    assert weight.item() == torch.tensor(1 - 2.0**-7 * exact).bfloat16().item()


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 31, 33, 1009])
def test_equals_torch_with_all_weights_active(numel):
    weight, grad = torch.randn(numel), torch.randn(numel)
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = grad.clone()
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
    optimizer = torch.optim.SGD([parameter], foreach=False, **options)
    momentum = torch.zeros(numel)
    for i in range(3):
        optimizer.step()
        step([weight], [grad], [momentum], [full_mask(numel)], first=i == 0, **options)
    torch.testing.assert_close(weight, parameter.detach(), rtol=1e-6, atol=1e-7)


NEAR_A_CHUNK = [1, 7, 2047, 2048, 2049, 4096 + 13]  # the Triton kernel takes 2048 at a time


@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_views_into_larger_memory(dtype, offset):
    """At any address, and what lies before and behind stays as it is."""

    def inside(numel, values):
        memory = values(offset + numel + 9).to(dtype)
        return memory, memory[offset : offset + numel]

    params = [inside(numel, torch.randn) for numel in NEAR_A_CHUNK]
    momenta = [inside(numel, torch.randn) for numel in NEAR_A_CHUNK]
    grads = [torch.randn(offset + numel).to(dtype)[offset:] for numel in NEAR_A_CHUNK]
    masks = [pack_mask(torch.rand(numel) < 0.3) for numel in NEAR_A_CHUNK]
    expected = [memory.clone() for memory, _ in params + momenta]
    of_expected = [
        memory[offset : offset + numel]
        for memory, numel in zip(expected, 2 * NEAR_A_CHUNK, strict=True)
    ]
    options = PLAIN | {"momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}
    count = len(params)
    reference.masked_sgd_(of_expected[:count], grads, of_expected[count:], masks, **options)
    step([view for _, view in params], grads, [view for _, view in momenta], masks, **options)
    for (memory, _), wanted in zip(params + momenta, expected, strict=True):
        torch.testing.assert_close(memory, wanted)


@pytest.mark.parametrize(
    ("dtype", "momentum_dtype"),
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_momentum_of_another_dtype(dtype, momentum_dtype):
    weight, grad = torch.randn(1009).to(dtype), torch.randn(1009).to(dtype)
    momentum, mask = torch.randn(1009).to(momentum_dtype), pack_mask(torch.rand(1009) < 0.5)
    options = PLAIN | {"lr": 0.1, "momentum": 0.9, "dampening": 0.2}
    wanted = weight.clone(), momentum.clone()
    reference.masked_sgd_([wanted[0]], [grad], [wanted[1]], [mask], **options)
    step([weight], [grad], [momentum], [mask], **options)
    for result, expected in zip((weight, momentum), wanted, strict=True):
        bounds = FP64 if result.dtype == torch.float64 else {}
        torch.testing.assert_close(result, expected, **bounds)


def test_a_second_step_finds_tensors_that_have_moved():
    """What a backend has kept of the tensors' addresses is not that of others."""
    weight, mask = torch.ones(33), full_mask(33)
    for grad in (torch.full((33,), 1.0), torch.full((33,), 2.0)):
        step([weight], [grad], [], [mask], lr=0.5)
    assert weight.tolist() == [-0.5] * 33
    step([moved := weight.clone()], [torch.ones(33)], [], [mask.clone()], lr=0.5)
    assert (weight.tolist(), moved.tolist()) == ([-0.5] * 33, [-1.0] * 33)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": []}, "grads: expected 1 tensors, one for each of params, got 0"),
        ({"grads": [torch.ones(8)]}, "grads[0]: expected the shape of params[0], (9,), got (8,)"),
        ({"grads": [torch.ones(9).half()]}, "grads[0]: expected float32 throughout"),
        (
            {"momenta": [], "momentum": 0.9},
            "momenta: expected 1 tensors, one for each of params, got 0",
        ),
        ({"masks": [full_mask(200)]}, "masks[0]: expected uint8 (16,)"),
        (
            {"lr_tensor": torch.ones(2)},
            "lr_tensor: expected a tensor of one element, got float32 (2,)",
        ),
        ({"found_inf": torch.ones(2)}, "found_inf: expected a tensor of one element"),
        ({"params": [torch.ones(9).long()]}, "params[0]: expected a float32, bfloat16"),
    ],
)
def test_errors_change_nothing(change, message):
    params = [torch.ones(9)]
    call = {
        "params": params,
        "grads": [torch.ones(9)],
        "momenta": [torch.ones(9)],
        "masks": [full_mask(9)],
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        step(**(call | change))
    assert params[0].tolist() == [1] * 9


def test_weight_and_momentum_must_not_share_memory():
    weight = torch.ones(9)
    with pytest.raises(ValueError, match=r"momenta\[0\]: expected memory of its own|params\[0\]"):
        step([weight], [torch.ones(9)], [weight], [full_mask(9)], momentum=0.9)
