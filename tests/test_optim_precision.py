"""MaskedSGD in half precision, and under a GradScaler."""

import copy

import pytest
import torch
from torch import nn

from granet_kernels import MaskedConv2d, MaskedSGD, attach_mask
from granet_kernels.layout import full_mask
from tests.helpers import INF, NAN
from tests.optimizer_twins import (
    MASKED,
    MOMENTA,
    MOMENTUM,
    SGD,
    backend,
    buffers,
    describe,
    identical,
    random_masks,
    set_gradients,
    twins,
)

__all__ = ["backend"]


# ---- half precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", MOMENTA, ids=describe)
def test_half_precision_rounds_each_result_once(dtype, options):
    """Arithmetic in fp32: |result - exact| is half a unit in the last place, and 1e-6 of the terms.

    torch.optim.SGD rounds after each of its operations, five at most in the momentum and one in the
    weight, each wrong by half a unit of a number no larger than the sum of all terms' magnitudes.
    """
    options = {"lr": 0.1, "dampening": 0.0, "nesterov": False} | options | {"weight_decay": 0.1}
    ours, theirs = twins(dtype)
    mine, other = MaskedSGD(ours, **options), SGD(theirs, **options)
    lr, mu, decay = options["lr"], options["momentum"], options["weight_decay"]
    half_ulp = torch.finfo(dtype).eps / 2
    for step in range(4):
        set_gradients(step, ours, theirs)
        weights = [param.detach().double() for param in ours]
        velocities = [None if b is None else b.double() for b in buffers(mine)]
        mine.step()
        other.step()
        for i in range(MASKED):
            grad = ours[i].grad.double() + decay * weights[i]
            velocity = grad
            if velocities[i] is not None:
                velocity = mu * velocities[i] + (1 - options["dampening"]) * grad
            update = grad + mu * velocity if options["nesterov"] else velocity
            exact = weights[i] - lr * update
            terms = weights[i].abs() + lr * (grad.abs() + (1 + mu) * velocity.abs())
            bound = half_ulp * exact.abs() + 1e-6 * terms + torch.finfo(dtype).tiny
            assert ((ours[i].double() - exact).abs() <= bound).all()
            if mu:
                bound = half_ulp * velocity.abs() + 1e-6 * terms / lr + torch.finfo(dtype).tiny
                assert ((buffers(mine)[i].double() - velocity).abs() <= bound).all()
            terms = terms + lr * (0 if velocities[i] is None else mu * velocities[i].abs())
            bound = half_ulp * (2 * exact.abs() + 6 * terms) + torch.finfo(dtype).tiny
            assert ((ours[i] - theirs[i]).double().abs() <= bound).all()
        with torch.no_grad():  # both start the next step from the same numbers
            for param, value in zip(theirs, ours, strict=True):
                param.copy_(value)
            for buffer, value in zip(buffers(other), buffers(mine), strict=True):
                if buffer is not None:
                    buffer.copy_(value)


def test_momentum_in_fp32_does_not_round_to_the_weights_dtype():
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    attach_mask(weight, full_mask(8))
    opt = MaskedSGD([weight], lr=0.0, momentum=0.9, momentum_dtype=torch.float32)
    weight.grad = torch.ones_like(weight)
    opt.step()
    opt.step()
    assert identical(opt.momentum_of(weight), torch.full((8,), 0.9) + 1)


def test_momentum_dtype_applies_to_a_state_of_torch():
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    other = SGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.ones_like(weight)
    other.step()
    attach_mask(weight, full_mask(8))
    opt = MaskedSGD([weight], lr=0.1, momentum=0.9, momentum_dtype=torch.float32)
    opt.load_state_dict(other.state_dict())
    assert opt.momentum_of(weight).dtype == torch.float32
    opt.step()
    assert opt.momentum_of(weight).dtype == torch.float32


# ---- GradScaler ----------------------------------------------------------------------------------


def scaled_step(scaler, opt, gradients, *, unscale_first=False):
    """One step whose gradients arrive multiplied by the scale, as backward of a scaled loss does."""
    scale = scaler.scale(torch.ones(())).item()
    for param, grad in gradients:
        param.grad = None if grad is None else grad * scale
    if unscale_first:
        scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()


@pytest.mark.parametrize("unscale_first", [False, True], ids=["scaled", "unscaled-before"])
@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_scaled_gradients_give_the_update_of_torch(unscale_first, flags):
    ours, theirs = twins(torch.float64)
    mine, other = MaskedSGD(ours, **MOMENTUM, **flags), SGD(theirs, **MOMENTUM)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        set_gradients(step, ours, theirs)
        gradients = [(param, param.grad) for param in ours]
        scaled_step(scaler, mine, gradients, unscale_first=unscale_first)
        other.step()
    assert scaler.get_scale() == 1024.0
    for param, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(param, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("first", [True, False], ids=["first-step", "later-step"])
@pytest.mark.parametrize("position", [0, 4], ids=["in-masked", "in-plain"])
@pytest.mark.parametrize("bad", [INF, NAN], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_infinite_gradient_changes_nothing(first, position, bad, momentum):
    ours, theirs = twins(torch.float64, masks=(masks := random_masks()))
    options = MOMENTUM | {"momentum": momentum}
    mine, other = MaskedSGD(ours, **options), SGD(theirs, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def good_step(step):
        set_gradients(step, ours, theirs)
        for i, mask in enumerate(masks):
            theirs[i].grad[~mask] = 0.0
        scaled_step(scaler, mine, [(param, param.grad) for param in ours])
        other.step()

    with torch.no_grad():
        for params in (ours, theirs):
            for param, mask in zip(params, masks, strict=False):
                param.copy_(torch.where(mask, param, 0.0))
    if not first:
        good_step(0)
    before = copy.deepcopy((mine.state_dict(), [param.data for param in ours]))
    set_gradients(1, ours)
    ours[position].grad.view(-1)[1] = bad
    scaled_step(scaler, mine, [(param, param.grad) for param in ours])
    assert scaler.get_scale() == 4.0
    after = (mine.state_dict(), [param.data for param in ours])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    for step in (2, 3):
        good_step(step)
    for param, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(param, expected, rtol=0, atol=1e-14)


def test_a_parameter_without_gradient_at_first_under_a_scaler():
    """Torch's fused update, which takes the scale, cannot start one momentum beside another."""
    ours, theirs = twins(torch.float64)
    mine, other = MaskedSGD(ours, **MOMENTUM), SGD(theirs, **MOMENTUM)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for step in range(3):
        set_gradients(step, ours, theirs)
        if step == 0:
            for i in (0, 4):
                ours[i].grad = theirs[i].grad = None
        scaled_step(scaler, mine, [(param, param.grad) for param in ours])
        other.step()
    for param, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(param, expected, rtol=0, atol=1e-14)


def test_gradients_of_masked_weights_stay_scaled():
    layer = MaskedConv2d(2, 2, 3, bias=False)
    opt = MaskedSGD(layer.parameters(), lr=0.1)
    scaled_step(
        torch.amp.GradScaler("cpu", init_scale=16.0),
        opt,
        [(layer.weight, torch.ones_like(layer.weight))],
    )
    assert torch.equal(layer.weight.grad, torch.full_like(layer.weight, 16.0))
