"""MaskedSGD against torch.optim.SGD with all weights active, and what both refuse."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import (
    optim_db,
    optim_error_inputs_func_sgd,
    optim_inputs_func_sgd,
)

from granet_kernels import MaskedLinear, MaskedSGD
from tests.helpers import INF, NAN
from tests.optimizer_twins import (
    EXACT,
    MOMENTA,
    MOMENTUM,
    SGD,
    SHAPES,
    assert_equal_states,
    backend,
    describe,
    identical,
    parameters,
    set_gradients,
    train,
    twins,
)

__all__ = ["backend"]

OPTIONS = [
    kwargs | {"weight_decay": decay, "maximize": maximize, "lr": lr}
    for kwargs, decay, maximize, lr in itertools.product(
        MOMENTA, (0.0, 0.1), (False, True), (0.1, torch.tensor(0.1))
    )
]


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=describe)
def test_equals_torch_step_for_step(options, dtype):
    ours, theirs = twins(dtype)
    train(range(4), ours, theirs, MaskedSGD(ours, **options), SGD(theirs, **options))


@pytest.mark.parametrize("case", optim_inputs_func_sgd("cpu"), ids=lambda case: case.desc)
@pytest.mark.parametrize("foreach", [None, False, True], ids=lambda flag: f"foreach={flag}")
def test_equals_torch_on_its_own_cases(case, foreach):
    ours, theirs = twins()
    options = case.kwargs | {"foreach": foreach}
    train(range(3), ours, theirs, MaskedSGD(ours, **options), SGD(theirs, **options))


@pytest.mark.parametrize("case", optim_inputs_func_sgd("cpu"), ids=lambda case: case.desc)
def test_equals_torch_fused(case):
    """Torch's fused kernel fuses multiplications and additions: a rounding error or two a step apart."""
    ours, theirs = twins(torch.float64)
    mine, other = (
        opt(p, **case.kwargs, fused=True) for opt, p in ((MaskedSGD, ours), (SGD, theirs))
    )
    for step in range(3):
        set_gradients(step, ours, theirs)
        mine.step()
        other.step()
    for param, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(param, expected, rtol=0, atol=1e-14)
    assert identical(ours[-1], theirs[-1])  # torch itself updates what has no mask


def test_weight_decay_as_a_tensor():
    ours, theirs = twins()
    options = MOMENTUM | {"weight_decay": torch.tensor(0.05)}
    train(range(3), ours, theirs, MaskedSGD(ours, **options), SGD(theirs, **options))


def test_signed_zeros_and_subnormals_as_torch():
    ours, theirs = twins()
    options = {"lr": 1.0, "momentum": 0.5}
    mine, other = MaskedSGD(ours, **options), SGD(theirs, **options)
    for params in (ours, theirs):
        with torch.no_grad():
            params[1].copy_(torch.tensor([0.0, -0.0, 1e-40, -1e-45, 1.0, INF, NAN]).expand(5, 7))
        for param in params:
            param.grad = torch.full_like(param, -0.0)
        params[1].grad = params[1].detach().clone()
    for _ in range(3):
        mine.step()
        other.step()
        assert_equal_states(mine, other)


@pytest.mark.parametrize("kind", ["sparse-embedding", "complex"])
def test_other_parameters_are_left_to_torch(kind):
    def trained(optimizer):
        torch.manual_seed(0)
        if kind == "complex":
            param = nn.Parameter(torch.randn(5, dtype=torch.complex64))
            loss = lambda: (param * param.conj()).real.sum()  # noqa: E731
        else:
            param = nn.Embedding(6, 3, sparse=True).weight
            loss = lambda: nn.functional.embedding(  # noqa: E731
                torch.tensor([1, 4, 1]), param, sparse=True
            ).sum()
        opt = optimizer([param], lr=0.1, momentum=0.9)
        for _ in range(3):
            opt.zero_grad()
            loss().backward()
            opt.step()
        return param

    assert torch.equal(trained(MaskedSGD), trained(SGD))


def test_parameters_without_gradient_and_momentum_that_starts_late():
    ours, theirs = twins()
    mine, other = MaskedSGD(ours, **MOMENTUM), SGD(theirs, **MOMENTUM)
    for step in range(4):
        set_gradients(step, ours, theirs)
        for i in (0, 4) if step < 2 else (1,):
            ours[i].grad = theirs[i].grad = None
        mine.step()
        other.step()
        assert_equal_states(mine, other)


def test_momentum_switched_on_and_off_during_the_run():
    ours, theirs = twins()
    mine, other = MaskedSGD(ours, lr=0.1), SGD(theirs, lr=0.1)
    for step, momentum in enumerate((0.0, 0.9, 0.9, 0.0, 0.9)):
        mine.param_groups[0]["momentum"] = other.param_groups[0]["momentum"] = momentum
        train([step], ours, theirs, mine, other)


def test_groups_have_their_own_options():
    ours, theirs = twins()

    def build(optimizer, params):
        groups = [
            {"params": params[:1], "lr": 0.5, "nesterov": True},
            {"params": params[1:2], "momentum": 0.0, "maximize": True},
            {"params": params[2:5], "weight_decay": 0.0, "foreach": True},
        ]
        built = optimizer(groups, **MOMENTUM)
        built.add_param_group({"params": params[5:], "dampening": 0.5})
        return built

    train(range(3), ours, theirs, build(MaskedSGD, ours), build(SGD, theirs))


def test_a_masked_parameter_added_later():
    ours, theirs = twins()
    mine, other = MaskedSGD(ours[1:], **MOMENTUM), SGD(theirs[1:], **MOMENTUM)
    train(range(2), ours, theirs, mine, other)
    mine.add_param_group({"params": ours[:1]})
    other.add_param_group({"params": theirs[:1]})
    assert mine.param_groups[1]["momentum_dtype"] is None
    train(range(2, 4), ours, theirs, mine, other)


def test_named_parameters():
    ours, theirs = twins()
    names = [f"layer{i}" for i in range(len(SHAPES))]
    mine, other = (
        opt(list(zip(names, params, strict=True)), **MOMENTUM)
        for opt, params in ((MaskedSGD, ours), (SGD, theirs))
    )
    train(range(2), ours, theirs, mine, other)
    mine.load_state_dict(other.state_dict())
    assert mine.param_groups[0]["param_names"] == names


SCHEDULES = next(info for info in optim_db if info.optim_cls is SGD).scheduler_inputs


@pytest.mark.parametrize(
    "schedulers", SCHEDULES, ids=[f"schedule{i}" for i in range(len(SCHEDULES))]
)
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_schedulers(schedulers, lr):
    ours, theirs = twins()
    optimizers = [
        cls(params, **(MOMENTUM | {"lr": copy.deepcopy(lr)}))
        for cls, params in ((MaskedSGD, ours), (SGD, theirs))
    ]
    schedules = [[make(opt) for make in schedulers] for opt in optimizers]
    for step in range(4):
        train([step], ours, theirs, *optimizers)
        for schedule in itertools.chain(*schedules):
            needs_metric = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
            schedule.step(*[1.0] * needs_metric)


def test_closure_is_called_with_gradients_enabled_and_its_loss_returned():
    layer = MaskedLinear(3, 2)
    opt = MaskedSGD(layer.parameters(), lr=0.1)
    before = layer.weight.detach().clone()

    def closure():
        opt.zero_grad()
        loss = layer(torch.ones(4, 3)).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = opt.step(closure)
    assert loss.requires_grad
    torch.testing.assert_close(layer.weight.detach(), before - 0.4)
    assert opt.step() is None


def test_hooks_run_around_the_step():
    layer, calls = MaskedLinear(3, 2), []
    opt = MaskedSGD(layer.parameters(), lr=0.1)
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.register_step_post_hook(lambda *_: calls.append("after"))
    opt.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    opt.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    layer.weight.grad = torch.ones(2, 3)
    opt.step()
    opt.load_state_dict(opt.state_dict())
    assert calls == ["before", "after", "saved", "loaded"]


@pytest.mark.parametrize(
    "case",
    optim_error_inputs_func_sgd("cpu", torch.float32),
    ids=lambda case: case.optimizer_error_input.desc,
)
def test_refuses_what_torch_refuses(case):
    given = case.optimizer_error_input
    expect = pytest.warns if issubclass(case.error_type, Warning) else pytest.raises
    with expect(case.error_type, match=case.error_regex):
        MaskedSGD(given.params or parameters(), **given.kwargs)
