"""MaskedSGD on weights with masks, of any memory layout, and what it refuses."""

import pytest
import torch
from torch import nn

from granet_kernels import MaskedLinear, MaskedSGD, attach_mask, pack_mask, sparsify
from granet_kernels.layout import full_mask
from tests.helpers import INF, NAN
from tests.optimizer_twins import (
    EXACT,
    MASKED,
    MOMENTA,
    MOMENTUM,
    SGD,
    backend,
    buffers,
    describe,
    identical,
    parameters,
    random_masks,
    set_gradients,
    twins,
)

__all__ = ["backend"]


# ---- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("options", MOMENTA, ids=describe)
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
def test_active_weights_follow_torch_and_inactive_ones_stay_zero(options, dtype, maximize):
    masks = random_masks()
    ours, theirs = twins(dtype, masks)
    options = options | {"lr": 0.1, "weight_decay": 0.1, "maximize": maximize}
    mine, other = MaskedSGD(ours, **options), SGD(theirs, **options)
    with torch.no_grad():
        for param, mask in zip(theirs, masks, strict=False):
            param.copy_(torch.where(mask, param, 0.0))
    for step in range(3):
        set_gradients(step, ours, theirs)
        for param, expected, mask in zip(ours, theirs, masks, strict=False):
            param.grad[~mask] = (NAN, INF, -INF)[step]
            expected.grad[~mask] = 0.0
        mine.step()
        other.step()
        for param, expected in zip(ours, theirs, strict=True):
            assert identical(param, expected + 0.0)
        for i, (buffer, expected) in enumerate(zip(buffers(mine), buffers(other), strict=True)):
            if buffer is not None and i < MASKED:
                expected = torch.where(masks[i], expected, 0.0)  # torch's may be -0.0
            assert identical(buffer, expected)


def test_what_a_foreign_hand_wrote_into_inactive_weights_is_zeroed():
    weight = nn.Parameter(torch.tensor([1.0, NAN, -0.0, INF]))
    attach_mask(weight, pack_mask(torch.tensor([True, False, False, False])))
    opt = MaskedSGD([weight], **MOMENTUM)
    weight.grad = torch.full((4,), NAN)
    weight.grad[0] = 0.0
    opt.step()
    expected = torch.tensor([1 - 0.1 * 0.05, 0.0, 0.0, 0.0])
    assert identical(weight, expected)


@pytest.mark.parametrize("how", ["mask-setter", "packed-in-place", "attach-another"])
def test_a_mask_changed_by_hand_zeroes_weight_and_momentum(how):
    layer = MaskedLinear(4, 4, bias=False)
    opt = MaskedSGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer.weight.grad = torch.ones(4, 4)
    for _ in range(3):
        opt.step()
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1] = True
    weight, momentum = layer.weight.detach().clone(), opt.momentum_of(layer.weight).clone()
    if how == "mask-setter":
        layer.mask = mask
    elif how == "packed-in-place":
        layer.packed_mask.copy_(pack_mask(mask))
    else:
        other = pack_mask(mask)
        while other._version < layer.packed_mask._version:
            other.add_(0)  # told from the former one by more than how often it was written
        attach_mask(layer.weight, other)
    opt.step()
    expected = torch.where(mask, 0.9 * momentum + 1, 0.0)
    assert identical(opt.momentum_of(layer.weight), expected)
    torch.testing.assert_close(layer.weight.data, torch.where(mask, weight - 0.1 * expected, 0.0))
    assert not layer.weight.data.masked_select(~mask).any()


def test_regrown_weights_start_without_momentum():
    layer = MaskedLinear(4, 4, bias=False)
    opt = MaskedSGD(layer.parameters(), lr=0.1, momentum=0.9)
    everything = layer.mask
    layer.weight.grad = torch.ones(4, 4)
    opt.step()
    layer.mask = torch.zeros(4, 4, dtype=torch.bool)
    opt.step()
    layer.mask = everything
    layer.weight.grad = torch.zeros(4, 4)
    opt.step()
    assert identical(layer.weight, torch.zeros(4, 4))


def test_masked_momentum_loaded_from_elsewhere_is_zero_where_inactive():
    layer = MaskedLinear(4, 4, bias=False)
    layer.mask = torch.eye(4, dtype=torch.bool)
    opt = MaskedSGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer.weight.grad = torch.ones(4, 4)
    opt.step()
    state = opt.state_dict()
    state["state"][0]["momentum_buffer"] = torch.full((4, 4), 2.0)
    opt.load_state_dict(state)
    layer.weight.grad = torch.zeros(4, 4)
    opt.step()
    assert identical(opt.momentum_of(layer.weight), 1.8 * torch.eye(4))


def test_an_optimizer_made_before_the_layers_were_masked():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    opt = MaskedSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    x = torch.randn(3, 4)
    model(x).sum().backward()
    opt.step()
    sparsify(model)
    mask = model[0].mask = torch.eye(4, dtype=torch.bool)
    model(x).sum().backward()
    opt.step()
    assert model[0].weight.data[~mask].tolist() == [0.0] * 12
    assert opt.momentum_of(model[0].weight)[~mask].tolist() == [0.0] * 12


def test_a_sparse_gradient_of_a_masked_weight_is_refused():
    weight = nn.Parameter(torch.zeros(6, 3))
    attach_mask(weight, full_mask(18))
    nn.functional.embedding(torch.tensor([1, 2]), weight, sparse=True).sum().backward()
    with pytest.raises(
        ValueError, match=r"params: expected a dense gradient .*\(6, 3\), got sparse"
    ):
        MaskedSGD([weight], lr=0.1).step()


# ---- memory layouts ------------------------------------------------------------------------------


def rotated(tensor):
    """The same values with the first dimension fastest in memory."""
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


LAYOUTS = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "channels_last": lambda tensor: tensor.contiguous(memory_format=torch.channels_last),
    "rotated": rotated,
}


@pytest.mark.parametrize("weight_layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", [*LAYOUTS, "expanded", "strided"])
def test_weights_and_gradients_of_any_layout(weight_layout, grad_layout):
    """Elementwise kernels may round differently on strided memory: one fused multiply-add a step."""
    shape = (6, 5, 3, 3)
    values = torch.randn(shape, dtype=torch.float64)
    mask = torch.rand(shape) < 0.5
    weight = nn.Parameter(LAYOUTS[weight_layout](values).clone(memory_format=torch.preserve_format))
    attach_mask(weight, pack_mask(mask, like=weight))
    expected = nn.Parameter(values * mask)
    mine, other = MaskedSGD([weight], **MOMENTUM), SGD([expected], **MOMENTUM)
    for _ in range(3):
        grad = torch.randn(shape, dtype=torch.float64)
        if grad_layout == "expanded":
            grad = grad[:1, :, :1, :1].expand(shape)
        elif grad_layout == "strided":
            grad = torch.stack([grad, grad + 1], dim=2)[:, :, 0]
        else:
            grad = LAYOUTS[grad_layout](grad)
        weight.grad, expected.grad = grad, (grad * mask).contiguous()
        mine.step()
        other.step()
    assert weight.stride() == LAYOUTS[weight_layout](values).stride()
    torch.testing.assert_close(weight.data, expected.data, rtol=0, atol=1e-14)
    assert mine.momentum_of(weight).stride() == weight.stride()
    torch.testing.assert_close(
        mine.momentum_of(weight), buffers(other)[0] * mask, rtol=0, atol=1e-14
    )


def test_a_transposed_linear_weight():
    weight = nn.Parameter(torch.randn(4, 6, dtype=torch.float64).t())
    mask = torch.rand(6, 4) < 0.5
    attach_mask(weight, pack_mask(mask, like=weight))
    start = weight.detach().clone()
    weight.grad = torch.randn(6, 4, dtype=torch.float64)
    MaskedSGD([weight], lr=0.1).step()
    expected = torch.where(mask, start - 0.1 * weight.grad, 0.0)
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-15)


# ---- differentiable ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", MOMENTA, ids=describe)
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_differentiable_steps(options, masked):
    shape = (3, 5)
    mask = torch.rand(shape) < 0.5 if masked else torch.ones(shape, dtype=torch.bool)
    start, first, second = (torch.randn(shape, dtype=torch.float64) for _ in range(3))

    def derivatives(optimizer):
        kept = mask if optimizer is SGD else torch.ones_like(mask)
        given = (start * mask, first * kept, second * kept)
        leaves = [t.clone().requires_grad_() for t in given]
        param = leaves[0].clone()
        if optimizer is MaskedSGD:
            attach_mask(param, pack_mask(mask))
        opt = optimizer([param], lr=0.1, weight_decay=0.1, differentiable=True, **options)
        for grad in leaves[1:]:
            param.grad = grad.clone()
            opt.step()
        return [param, *torch.autograd.grad(param.pow(3).sum(), leaves, allow_unused=True)]

    for ours, theirs in zip(derivatives(MaskedSGD), derivatives(SGD), strict=True):
        if theirs is None:  # torch starts momentum from a detached gradient
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs * mask, rtol=0, atol=0)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fused": True, "foreach": True}, RuntimeError, "cannot be `True` together"),
        ({"fused": True, "differentiable": True}, RuntimeError, "does not support `different"),
        ({"nesterov": True}, ValueError, "Nesterov momentum requires"),
        ({"lr": torch.ones(2)}, ValueError, "lr must be 1-element"),
        ({"weight_decay": -1}, ValueError, "Invalid weight_decay"),
        (
            {"momentum_dtype": torch.int32},
            ValueError,
            r"momentum_dtype: expected a floating dtype, got torch\.int32",
        ),
    ],
    ids=[
        "fused-foreach",
        "fused-differentiable",
        "nesterov",
        "lr",
        "weight-decay",
        "momentum-dtype",
    ],
)
def test_refuses_impossible_options(options, error, message):
    with pytest.raises(error, match=message):
        MaskedSGD(parameters(), **options)


def test_a_gradient_that_does_not_fit_leaves_all_as_it_was():
    ours, _ = twins()
    opt = MaskedSGD(ours[:MASKED], lr=0.1)
    set_gradients(0, ours)
    before = [param.detach().clone() for param in ours]
    attach_mask(ours[1], full_mask(1000))
    with pytest.raises(ValueError, match=r"masks\[\d\]: expected uint8"):
        opt.step()
    for param, value in zip(ours, before, strict=True):
        assert identical(param, value)
