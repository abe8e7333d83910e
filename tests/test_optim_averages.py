"""Averages of the weights that MaskedSGD moves in its step, against torch's AveragedModel."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from granet_kernels import MaskedSGD, attach_mask, masked_layers, pack_mask, sparsify
from tests.helpers import INF, NAN
from tests.optimizer_twins import SGD, backend, identical, random_masks, set_gradients, twins

__all__ = ["backend"]

DECAY = 0.9


def network(dtype=torch.float32):
    """Masked weights of two layouts, and parameters without a mask."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1), nn.Linear(7, 3))
    model = sparsify(nn.Sequential(*layers)).to(dtype)
    model[2].to(memory_format=torch.channels_last)
    for layer in masked_layers(model).values():
        layer.mask = torch.rand(layer.weight.shape) < 0.4
    return model


def give_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        noise = torch.randn(param.shape, generator=generator)
        param.grad = torch.empty_like(param).copy_(noise)


def averaging(model, decay=DECAY, **options):
    """An optimizer, and the copy of the model that it averages into."""
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01} | options
    average = copy.deepcopy(model).to(
        torch.promote_types(next(model.parameters()).dtype, torch.float)
    )
    optimizer = MaskedSGD(model.parameters(), **options)
    optimizer.average_into(average.parameters(), decay)
    return optimizer, average


def clones(model):
    return [param.detach().clone() for param in model.parameters()]


# ---- as AveragedModel does -----------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"nesterov": True}], ids=str)
def test_averages_are_those_of_an_averaged_model(options, dtype, decay):
    """Also where a parameter gets no gradient, and after masks have changed by hand."""
    model = network(dtype)
    twin = copy.deepcopy(model)
    optimizer, average = averaging(model, decay, **options)
    other = MaskedSGD(
        twin.parameters(), **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01} | options
    )
    expected = AveragedModel(twin, multi_avg_fn=get_ema_multi_avg_fn(decay))
    expected.update_parameters(twin)  # the first time it is a copy
    for step in range(6):
        for network_ in (model, twin):
            give_gradients(network_, step)
            if step == 2:
                network_[0].weight.grad = network_[1].bias.grad = None
            if step == 4:
                layer = network_[2]
                layer.mask = (
                    torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
                )
        optimizer.step()
        other.step()
        expected.update_parameters(twin)
        for param, value in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(param, value)
        for layer, mean in zip(model, expected.module, strict=True):
            if hasattr(layer, "mask"):  # theirs remembers what is inactive now
                mean.weight.data[~layer.mask] = 0.0
        for mine, theirs in zip(average.parameters(), expected.module.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_averaged_in_fp32(dtype):
    model = network(dtype)
    optimizer, average = averaging(model, 0.999)
    expected = clones(average)
    for step in range(3):
        give_gradients(model, step)
        optimizer.step()
        for mean, param in zip(expected, model.parameters(), strict=True):
            mean.lerp_(param.detach().float(), 1 - 0.999)
    for mine, theirs in zip(average.parameters(), expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_groups_and_models_without_masks():
    ours, theirs = twins()
    for params in (ours, theirs):
        averages = [param.detach().clone() for param in params]
        settings = [{"params": params[3:]}, {"params": params[:3], "lr": 0.01}]
        optimizer = MaskedSGD(settings, lr=0.1)
        before = [average.clone() for average in averages]
        optimizer.average_into([*averages[3:], *averages[:3]], 0.5)
        set_gradients(0, params)
        optimizer.step()
        for average, old, param in zip(averages, before, params, strict=True):
            torch.testing.assert_close(average, (old + param.detach()) / 2)


def test_a_differentiable_group_is_averaged_outside_of_autograd():
    masks = random_masks()
    param = torch.randn(masks[1].shape, dtype=torch.float64).requires_grad_()
    weight = param * masks[1]
    attach_mask(weight, pack_mask(masks[1]))
    average = weight.detach().clone()
    optimizer = MaskedSGD([weight], lr=0.1, differentiable=True)
    optimizer.average_into([average], 0.5)
    weight.grad = torch.ones_like(weight)
    old = average.clone()
    optimizer.step()
    assert not average.requires_grad
    torch.testing.assert_close(average, (old + weight.detach()) / 2)


# ---- decays, none any more -----------------------------------------------------------------------


def test_the_decay_may_change_between_steps():
    model = network()
    optimizer, average = averaging(model, 0.9)
    assert optimizer.average_decay == 0.9
    optimizer.average_decay = 0.0
    give_gradients(model, 0)
    optimizer.step()
    for mean, param in zip(average.parameters(), model.parameters(), strict=True):
        assert torch.equal(mean, param)


def test_none_ends_it():
    model = network()
    optimizer, average = averaging(model)
    optimizer.average_into(None)
    before = clones(average)
    give_gradients(model, 0)
    optimizer.step()
    for mean, old in zip(average.parameters(), before, strict=True):
        assert torch.equal(mean, old)


def test_other_averages_from_now_on():
    model = network()
    optimizer, first = averaging(model)
    give_gradients(model, 0)
    optimizer.step()
    second, before = copy.deepcopy(model), clones(first)
    for layer in masked_layers(second).values():
        layer.weight.data[~layer.mask] = NAN  # what nobody may read
    optimizer.average_into(second.parameters(), 0.5)
    optimizer.step()
    for mean, old in zip(first.parameters(), before, strict=True):
        assert torch.equal(mean, old)
    for layer, of_model in zip(
        masked_layers(second).values(), masked_layers(model).values(), strict=True
    ):
        assert torch.equal(
            layer.weight[~of_model.mask], torch.zeros_like(layer.weight[~of_model.mask])
        )
        assert layer.weight.isfinite().all()


# ---- masks, and gradients that are not finite ----------------------------------------------------


@pytest.mark.parametrize("how", ["mask-setter", "packed-in-place"])
def test_what_becomes_inactive_is_zero_in_the_average(how):
    model = network()
    optimizer, average = averaging(model)
    give_gradients(model, 0)
    optimizer.step()
    layer = model[0]
    mask = layer.mask & (torch.rand(layer.weight.shape) < 0.5)
    if how == "mask-setter":
        layer.mask = mask
    else:
        layer.packed_mask.copy_(pack_mask(mask, like=layer.weight))
    optimizer.step()
    assert not average[0].weight[~mask].any()
    assert average[0].weight[mask].all()


def test_a_regrown_weight_is_averaged_from_zero():
    model = network()
    optimizer, average = averaging(model, 0.5)
    give_gradients(model, 0)
    optimizer.step()
    old = model[0].mask
    model[0].mask = ~old
    optimizer.step()
    expected = torch.where(old, 0.0, model[0].weight / 2)
    assert torch.equal(average[0].weight, expected)


@pytest.mark.parametrize("bad", [INF, NAN], ids=str)
@pytest.mark.parametrize("position", [0, 4], ids=["in-masked", "in-plain"])
@pytest.mark.parametrize("first", [True, False], ids=["first-step", "later-step"])
def test_a_step_that_a_scaler_skips_moves_no_average(bad, position, first):
    ours, _ = twins(masks=random_masks())
    optimizer = MaskedSGD(ours, lr=0.1, momentum=0.9)
    averages = [torch.randn_like(param) for param in ours]
    averages[5][0, 0] = -0.0
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer.average_into(averages, 0.5)

    def step(number, grad=None):
        scale = scaler.scale(torch.ones(())).item()
        set_gradients(number, ours)
        for param in ours:
            param.grad *= scale
        if grad is not None:
            ours[position].grad.view(-1)[1] = grad
        scaler.step(optimizer)
        scaler.update()

    if not first:
        step(0)
    before = [average.clone() for average in averages]
    step(1, bad)
    assert scaler.get_scale() == 4.0
    for average, old in zip(averages, before, strict=True):
        assert identical(average, old)
    step(2)
    for i, (average, old, param) in enumerate(zip(averages, before, ours, strict=True)):
        if i >= 4:
            torch.testing.assert_close(average, old.lerp(param.detach(), 0.5))
        elif param.any():
            assert not torch.equal(average, old)


# ---- saving, copying -----------------------------------------------------------------------------


def test_the_state_is_that_of_torch():
    model = network()
    optimizer, _ = averaging(model)
    give_gradients(model, 0)
    optimizer.step()
    state = optimizer.state_dict()
    assert state.keys() == {"state", "param_groups"}
    assert all(entry.keys() == {"momentum_buffer"} for entry in state["state"].values())
    SGD(model.parameters(), lr=0.1).load_state_dict(state)


def test_averages_stay_when_a_state_is_loaded():
    model = network()
    optimizer, average = averaging(model)
    give_gradients(model, 0)
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = clones(average)
    optimizer.step()
    for mean, old, param in zip(average.parameters(), before, model.parameters(), strict=True):
        torch.testing.assert_close(mean.detach(), old.lerp(param.detach(), 1 - DECAY))


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_of_all_averages_into_its_own(copied):
    model = network()
    optimizer, average = averaging(model)
    give_gradients(model, 0)
    optimizer.step()
    twin, twin_optimizer, twin_average = copied((model, optimizer, average))
    assert twin_optimizer.average_decay == DECAY
    before = clones(average)
    give_gradients(twin, 1)
    twin_optimizer.step()
    for mean, old in zip(average.parameters(), before, strict=True):
        assert torch.equal(mean, old)
    give_gradients(model, 1)
    optimizer.step()
    for mean, other in zip(average.parameters(), twin_average.parameters(), strict=True):
        assert torch.equal(mean, other)


@pytest.mark.parametrize("averaged", [False, True])
def test_a_copy_of_the_optimizer_alone_works(averaged):
    model = network()
    optimizer, average = averaging(model)
    if not averaged:
        optimizer.average_into(None)
    before = clones(average)
    twin = copy.deepcopy(optimizer)
    for param in twin.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    twin.step()
    for mean, old in zip(average.parameters(), before, strict=True):
        assert torch.equal(mean, old)


# ---- bad input -----------------------------------------------------------------------------------


def without_the_last(averages):
    del averages[-1]


def of_another_shape(averages):
    averages[1] = torch.ones(9)


def in_half_precision(averages):
    averages[0] = averages[0].bfloat16()


def in_another_order(averages):
    averages[0] = averages[0].to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without_the_last,
            "averages: expected 8 tensors, one for each parameter of the optimizer, got 7",
        ),
        (of_another_shape, "averages[1]: expected the shape of params[1], (8,), got (9,)"),
        (
            in_half_precision,
            "averages[0]: expected float32, in which params[0], float32, is computed, got bfloat16",
        ),
        (in_another_order, "averages[0]: expected the memory layout of params[0], strides (27,"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_averages_that_do_not_fit_leave_all_as_it_was(change, message):
    model = network()
    optimizer, average = averaging(model)
    others = clones(model)
    change(others)
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.average_into(others, 0.5)
    assert optimizer.average_decay == DECAY
    before = clones(average)
    give_gradients(model, 0)
    optimizer.step()
    for mean, old, param in zip(average.parameters(), before, model.parameters(), strict=True):
        torch.testing.assert_close(mean.detach(), old.lerp(param.detach(), 1 - DECAY))


ALIASES = {
    "the parameters": lambda model, optimizer: list(model.parameters()),
    "views of them": lambda model, optimizer: [param.detach() for param in model.parameters()],
    "gradients": lambda model, optimizer: [param.grad for param in model.parameters()],
    "momenta": lambda model, optimizer: [
        optimizer.state[param]["momentum_buffer"] for param in model.parameters()
    ],
    "one twice": lambda model, optimizer: [clones(model)[1]] * 2,
}


@pytest.mark.parametrize("alias", ALIASES)
@pytest.mark.parametrize("is_masked", [True, False])
def test_averages_have_memory_of_their_own(alias, is_masked):
    layers = [nn.Linear(4, 4, bias=False) for _ in range(2)]
    model = sparsify(nn.Sequential(*layers)) if is_masked else nn.Sequential(*layers)
    optimizer = MaskedSGD([{"params": [layer.weight]} for layer in model], lr=0.1, momentum=0.9)
    give_gradients(model, 0)
    optimizer.step()
    with pytest.raises(ValueError, match=r"averages\[\d\]: expected memory of its own"):
        optimizer.average_into(ALIASES[alias](model, optimizer))


@pytest.mark.parametrize(
    ("averages", "message"),
    [
        (lambda m: m.named_parameters(), "averages[0]: expected a tensor, got tuple"),
        (lambda m: [None] * 8, "averages[0]: expected a tensor, got NoneType"),
        (lambda m: [p.detach().numpy() for p in m.parameters()], "expected a tensor, got ndarray"),
        (
            lambda m: [torch.zeros(1).expand(p.shape) for p in m.parameters()],
            "averages[0]: expected a tensor without gaps in memory, got shape (8, 3, 3, 3) with",
        ),
        (
            lambda m: [*clones(m)[:-1], torch.zeros(1).expand(3)],
            "averages[7]: expected a tensor without gaps in memory, got shape (3,) with strides (0,)",
        ),
    ],
    ids=["named", "none", "numpy", "expanded", "an expanded bias"],
)
def test_averages_that_are_no_tensors_of_their_own(averages, message):
    model = network()
    optimizer = MaskedSGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.average_into(averages(model))


@pytest.mark.parametrize("change", ["channels_last", "double"])
def test_a_model_that_no_longer_fits_its_averages_is_left_alone(change):
    """All of it, and the averages: nothing has been zeroed by the bits of another order."""
    model = network()
    plain = nn.Parameter(torch.ones(5))
    groups = [{"params": [plain]}, {"params": list(model.parameters())}]
    optimizer = MaskedSGD(groups, lr=0.1, momentum=0.9)
    average = [torch.ones(5), *clones(model)]
    optimizer.average_into(average)
    for step in range(2):
        if step == 1:
            model = (
                model.double()
                if change == "double"
                else model.to(memory_format=torch.channels_last)
            )
        plain.grad = torch.ones(5)
        give_gradients(model, step)
        before = [*map(torch.clone, average), plain.detach().clone(), *clones(model)]
        if step == 0:
            optimizer.step()
            continue
        with pytest.raises(
            ValueError, match=r"averages\[0\]: expected (float64|the memory layout)"
        ):
            optimizer.step()
        for tensor, old in zip([*average, plain, *model.parameters()], before, strict=True):
            assert torch.equal(tensor, old)


@pytest.mark.parametrize("how", ["without a gradient", "differentiable"])
def test_what_becomes_inactive_is_zero_whoever_moves_the_average(how):
    mask = torch.rand(8, 16) < 0.5
    param = torch.randn(8, 16) * mask
    packed = pack_mask(mask)
    attach_mask(param, packed)
    optimizer = MaskedSGD([param], lr=0.1, differentiable=how == "differentiable")
    average = torch.ones(8, 16)
    optimizer.average_into([average], DECAY)
    param.grad = None if how == "without a gradient" else torch.ones(8, 16)
    for _ in range(2):
        optimizer.step()
        assert not average[~mask].any()
        assert average[mask].all()
        mask &= torch.rand(8, 16) < 0.5
        param.masked_fill_(~mask, 0.0)
        packed.copy_(pack_mask(mask))


@pytest.mark.parametrize("decay", [-0.1, 1.1, NAN, "0.5", None])
def test_refuses_impossible_decays(decay):
    model = network()
    optimizer, average = averaging(model)
    with pytest.raises(ValueError, match=r"average_decay: expected a number in \[0, 1\], got"):
        optimizer.average_into(average.parameters(), decay)
    with pytest.raises(ValueError, match=r"average_decay: expected a number in \[0, 1\], got"):
        optimizer.average_decay = decay
    assert optimizer.average_decay == DECAY


@pytest.mark.parametrize("how", ["a-group", "a-parameter"])
def test_parameters_that_are_added_have_no_average(how):
    model = network()
    optimizer, average = averaging(model)
    extra = nn.Parameter(torch.ones(3))
    if how == "a-group":
        optimizer.add_param_group({"params": [extra]})
    else:
        optimizer.param_groups[0]["params"].append(extra)
    before = clones(model)
    give_gradients(model, 0)
    with pytest.raises(ValueError, match=r"averages: expected .* call average_into again"):
        optimizer.step()
    for param, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(param, old)
    optimizer.average_into([*average.parameters(), extra.detach().clone()], DECAY)
    optimizer.step()
