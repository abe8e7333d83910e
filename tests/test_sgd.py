"""masked_sgd_ by hand and against torch.optim.SGD, on every backend."""

import re

import pytest
import torch

from granet_kernels import pack_mask, use_backend
from granet_kernels.backends import reference
from granet_kernels.layout import full_mask
from granet_kernels.selftest import backends_with
from tests.helpers import FP64, INF, NAN, bits, mask_of

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


# ---- averages ------------------------------------------------------------------------------------


def average_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def test_average_by_hand():
    """w' = 2 - 0.5 * 1 = 1.5; a' = 4 + 0.25 * (1.5 - 4)."""
    weight, average = torch.tensor([2.0, 2.0]), torch.tensor([4.0, NAN])
    mask = pack_mask(mask_of(1, 0))
    before = bits(average)
    step([weight], [torch.ones(2)], [], [mask], averages=[average], average_decay=0.75)
    assert bits(weight) == bits([1.5, 2.0])
    assert bits(average) == [*bits([3.375]), before[1]]


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_the_ends_of_a_decay_are_exact(decay):
    """Of numbers so far apart that their difference is rounded: all of the weight, or nothing."""
    weight, average = torch.tensor([1.0, 3.0]), torch.tensor([1e20, -1e-20])
    expected = [0.5, 2.5] if decay == 0 else average.tolist()
    step([weight], [torch.ones(2)], [], [full_mask(2)], averages=[average], average_decay=decay)
    assert average.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_average_is_of_the_weight_as_it_is_stored(dtype):
    """1 - 2^-10 is 1 in bf16, as 1 - 2^-13 is in fp16; the average has more bits than either."""
    lr = 2.0 ** (-10 if dtype == torch.bfloat16 else -13)
    weight, grad = torch.ones(9).to(dtype), torch.ones(9).to(dtype)
    average = torch.full((9,), 1.5)
    options = {"lr": lr, "averages": [average], "average_decay": 0.5}
    step([weight], [grad], [], [full_mask(9)], **options)
    assert weight.tolist() == [1.0] * 9
    assert average.tolist() == [1.25] * 9


def test_infinite_gradients_move_no_average():
    weight, average = torch.tensor([2.0]), torch.tensor([4.0])
    scaler = {"grad_scale": torch.tensor(8.0), "found_inf": torch.tensor(1.0)}
    averages = {"averages": [average], "average_decay": 0.5}
    step([weight], [torch.tensor([NAN])], [], [full_mask(1)], **averages, **scaler)
    assert (weight.item(), average.item()) == (2.0, 4.0)


@pytest.mark.parametrize("values", [NAN, INF, -INF], ids=str)
def test_what_is_not_finite_shows_in_the_average(values):
    """Where it is active; nobody else is touched."""
    weight, average = torch.zeros(33), torch.ones(33)
    grad = torch.full((33,), -values)
    active = torch.arange(33) % 4 == 0
    averages = {"averages": [average], "average_decay": 0.9}
    step([weight], [grad], [], [pack_mask(active)], **averages)
    assert not average[active].isfinite().any()
    assert average[~active].tolist() == [1.0] * 24


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_averages_in_larger_memory(dtype, offset, momentum):
    """Inactive ones, and what lies before and behind, keep their bits, NaN payloads included."""
    params = [torch.randn(numel).to(dtype) for numel in NEAR_A_CHUNK]
    grads = [torch.randn(numel).to(dtype) for numel in NEAR_A_CHUNK]
    momenta = [torch.randn(numel).to(dtype) for numel in NEAR_A_CHUNK] if momentum else []
    masks = [
        torch.rand(numel) < density for numel, density in zip(NEAR_A_CHUNK, DENSITIES, strict=True)
    ]
    packed = [pack_mask(mask) for mask in masks]
    memory = [torch.randn(offset + n + 9).to(average_dtype(dtype)) for n in NEAR_A_CHUNK]
    averages = [m[offset : offset + n] for m, n in zip(memory, NEAR_A_CHUNK, strict=True)]
    for average, mask in zip(averages, masks, strict=True):
        average[~mask] = NAN
    options = PLAIN | {"momentum": momentum, "average_decay": 0.9}
    before = [m.clone() for m in memory]
    step(params, grads, momenta, packed, averages=averages, **options)
    for i, (after, old, mask) in enumerate(zip(memory, before, masks, strict=True)):
        written = torch.zeros(old.shape, dtype=torch.bool)
        written[offset : offset + mask.numel()] = mask
        expected = old.clone()
        expected[written] = old[written].lerp(params[i][mask].to(old.dtype), 0.1)
        torch.testing.assert_close(after[written], expected[written])
        assert torch.equal(as_bits(after)[~written], as_bits(old)[~written])


DENSITIES = [1.0, 1.0, 0.02, 0.0, 0.3, 0.9]  # of NEAR_A_CHUNK


def as_bits(tensor):
    return tensor.view(torch.int64 if tensor.dtype == torch.float64 else torch.int32)


def test_averages_of_any_memory_layout():
    shape = (4, 10, 3, 3)
    weight = torch.randn(shape).to(memory_format=torch.channels_last)
    average = torch.randn(shape).to(memory_format=torch.channels_last)
    mask = torch.rand(shape) < 0.5
    wanted = torch.where(mask, average.lerp(weight - 0.5, 0.25), average)
    averages = {"averages": [average], "average_decay": 0.75}
    step([weight], [torch.ones(shape)], [], [pack_mask(mask, like=weight)], **averages)
    torch.testing.assert_close(average, wanted)


def test_averages_change_nothing_else():
    """And an empty list is none."""
    weight, momentum, grad = torch.randn(3, 1009)
    mask, options = pack_mask(torch.rand(1009) < 0.5), {"momentum": 0.9, "weight_decay": 0.1}
    others = [(weight.clone(), momentum.clone()) for _ in range(2)]
    step([weight], [grad], [momentum], [mask], **options)
    for (w, v), averages in zip(others, ([torch.randn(1009)], []), strict=True):
        step([w], [grad], [v], [mask], averages=averages, average_decay=0.9, **options)
        assert bits(w) == bits(weight)
        assert bits(v) == bits(momentum)


def test_autograd_is_told_that_averages_changed():
    weight, average = torch.ones(9), torch.ones(9)
    version = average._version
    step([weight], [torch.ones(9)], [], [full_mask(9)], averages=[average], average_decay=0.9)
    assert average._version > version


# ---- errors --------------------------------------------------------------------------------------


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
        (
            {"averages": 2 * [torch.ones(9)]},
            "averages: expected 1 tensors, one for each of params, got 2",
        ),
        (
            {"averages": [torch.ones(9).bfloat16()]},
            "averages[0]: expected float32, in which params[0], float32, is computed, got bfloat16 (9,)",
        ),
        ({"averages": [torch.ones(8)]}, "averages[0]: expected the shape of params[0], (9,), got"),
        ({"averages": [torch.ones(18)[::2]]}, "averages[0]: expected a tensor without gaps"),
        (
            {"averages": [torch.ones(9)], "average_decay": 1.5},
            "average_decay: expected a number in",
        ),
        (
            {"averages": [torch.ones(9)], "average_decay": -0.1},
            "average_decay: expected a number in",
        ),
        ({"averages": [torch.ones(9)], "average_decay": NAN}, "in [0, 1], got nan"),
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_averages_of_half_precision_are_refused(dtype):
    weight, grad, average = torch.ones(3, 9).to(dtype)
    message = f"averages[0]: expected float32, in which params[0], {str(dtype)[6:]}, is computed"
    with pytest.raises(ValueError, match=re.escape(message)):
        step([weight], [grad], [], [full_mask(9)], averages=[average], average_decay=0.9)
    assert weight.tolist() == average.tolist() == [1] * 9


def test_an_average_of_another_memory_layout_is_refused():
    weight, average = torch.ones(4, 3), torch.ones(3, 4).t()
    with pytest.raises(
        ValueError, match=r"averages\[0\]: expected the memory layout of params\[0\]"
    ):
        step([weight], [torch.ones(4, 3)], [], [full_mask(12)], averages=[average])


def test_an_average_must_have_memory_of_its_own():
    weight, grad = torch.ones(9), torch.ones(9)
    for shared in (weight, grad):
        with pytest.raises(ValueError, match=r"(averages|params)\[0\]: expected memory of its own"):
            step([weight], [grad], [], [full_mask(9)], averages=[shared], average_decay=0.9)
    assert weight.tolist() == grad.tolist() == [1] * 9


def test_weight_and_momentum_must_not_share_memory():
    weight = torch.ones(9)
    with pytest.raises(ValueError, match=r"momenta\[0\]: expected memory of its own|params\[0\]"):
        step([weight], [torch.ones(9)], [weight], [full_mask(9)], momentum=0.9)
