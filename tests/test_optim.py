"""MaskedSGD against torch.optim.SGD: with all weights active, with masks, and over a run's life."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import (
    optim_db,
    optim_error_inputs_func_sgd,
    optim_inputs_func_sgd,
)

from granet_kernels import (
    MaskedConv2d,
    MaskedLinear,
    MaskedSGD,
    attach_mask,
    attached_mask,
    available_backends,
    pack_mask,
    sparsify,
    use_backend,
)
from granet_kernels.layout import full_mask
from tests.helpers import INF, NAN

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


# ---- all weights active: torch.optim.SGD ---------------------------------------------------------

MOMENTA = [
    {"momentum": 0.0},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.5},
    {"momentum": 0.9, "nesterov": True},
]
OPTIONS = [
    kwargs | {"weight_decay": decay, "maximize": maximize, "lr": lr}
    for kwargs, decay, maximize, lr in itertools.product(
        MOMENTA, (0.0, 0.1), (False, True), (0.1, torch.tensor(0.1))
    )
]


def describe(options):
    names = (f"{k}={v.item() if isinstance(v, torch.Tensor) else v}" for k, v in options.items())
    tensors = ["tensor_" + k for k, v in options.items() if isinstance(v, torch.Tensor)]
    return "-".join([*names, *tensors])


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


# ---- saving, copying -----------------------------------------------------------------------------


def reload(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("source", [MaskedSGD, SGD], ids=lambda cls: f"from-{cls.__name__}")
@pytest.mark.parametrize("target", [MaskedSGD, SGD], ids=lambda cls: f"to-{cls.__name__}")
@pytest.mark.parametrize("steps", [0, 2], ids=["fresh", "after-two-steps"])
def test_state_dict_goes_to_and_from_torch(source, target, steps):
    ours, theirs = twins()
    train(
        range(steps), ours, theirs, (mine := MaskedSGD(ours, **MOMENTUM)), SGD(theirs, **MOMENTUM)
    )
    saved = reload(mine.state_dict())
    if source is SGD:
        for group in saved["param_groups"]:
            del group["momentum_dtype"]
    resumed, expected = twins()
    for params in (resumed, expected):
        for param, value in zip(params, ours, strict=True):
            param.data.copy_(value.data)
    loaded = target(resumed, lr=99.0)
    loaded.load_state_dict(saved)
    other = SGD(expected, lr=99.0)
    other.load_state_dict(reload(saved))  # torch keeps the very tensors it is given
    for step in range(2, 4):
        set_gradients(step, resumed, expected)
        loaded.step()
        other.step()
        for param, value in zip(resumed, expected, strict=True):
            assert identical(param, value)
    for buffer, value in zip(buffers(loaded), buffers(other), strict=True):
        assert identical(buffer, value)


def test_loaded_momentum_is_a_copy():
    ours, _ = twins()
    mine = MaskedSGD(ours, **MOMENTUM)
    set_gradients(0, ours)
    mine.step()
    state = mine.state_dict()
    other = MaskedSGD(ours, **MOMENTUM)
    other.load_state_dict(state)
    for i in range(MASKED):
        assert buffers(other)[i] is not state["state"][i]["momentum_buffer"]


def small_model():
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)))
    model[0].mask = torch.rand(model[0].weight.shape) < 0.5
    return model


def fit(model, opt, steps):
    for step in steps:
        opt.zero_grad()
        x = torch.randn(4, 2, 4, 4, generator=generator(step))
        model(x).square().sum().backward()
        opt.step()


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("model_first", [True, False], ids=["model-first", "optimizer-first"])
def test_a_copied_model_and_optimizer_continue_alike(copied, model_first):
    model = small_model()
    opt = MaskedSGD(model.parameters(), lr=0.01, momentum=0.9)
    fit(model, opt, range(2))
    pair = copied((model, opt) if model_first else (opt, model))
    twin, twin_opt = pair if model_first else pair[::-1]
    assert twin_opt.param_groups[0]["params"][0] is twin[0].weight
    assert attached_mask(twin[0].weight) is twin[0].packed_mask
    twin[0].mask = model[0].mask & (torch.rand(model[0].weight.shape) < 0.5)
    assert model[0].count_active() > twin[0].count_active()
    model[0].mask = twin[0].mask
    fit(model, opt, range(2, 4))
    fit(twin, twin_opt, range(2, 4))
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert identical(param, other)


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


@pytest.mark.parametrize("there_and_back", [False, True], ids=["moved", "moved-and-back"])
def test_momentum_follows_the_memory_format_of_the_model(there_and_back):
    def trained(moves):
        model = small_model().double()
        opt = MaskedSGD(model.parameters(), lr=0.01, momentum=0.9)
        for step in range(6):
            if step == 2 and moves:
                model.to(memory_format=torch.channels_last)
            if step == 4 and moves and there_and_back:
                model.to(memory_format=torch.contiguous_format)
            opt.zero_grad()
            x = torch.randn(4, 2, 4, 4, generator=generator(step), dtype=torch.float64)
            model(x).square().sum().backward()
            opt.step()
        return model, opt

    (plain, plain_opt), (moved, moved_opt) = trained(False), trained(True)
    torch.testing.assert_close(moved[0].weight, plain[0].weight, rtol=1e-10, atol=1e-12)
    momentum = moved_opt.momentum_of(moved[0].weight)
    assert momentum.stride() == moved[0].weight.stride()
    torch.testing.assert_close(
        momentum, plain_opt.momentum_of(plain[0].weight), rtol=1e-10, atol=1e-12
    )
    assert not momentum[~moved[0].mask].any()


def test_a_state_saved_in_one_memory_format_loads_in_another():
    source, target = small_model(), small_model().to(memory_format=torch.channels_last)
    opt, other = (
        MaskedSGD(model.parameters(), lr=0.01, momentum=0.9) for model in (source, target)
    )
    fit(source, opt, range(2))
    target.load_state_dict(source.state_dict())
    other.load_state_dict(reload(opt.state_dict()))
    assert identical(other.momentum_of(target[0].weight), opt.momentum_of(source[0].weight))
    fit(source, opt, range(2, 4))
    fit(target, other, range(2, 4))
    torch.testing.assert_close(target[0].weight, source[0].weight)


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


def test_momentum_dtype_survives_saving():
    def build():
        params = parameters(torch.bfloat16)[:MASKED]
        for param in params:
            attach_mask(param, full_mask(param.numel()))
        return params, MaskedSGD(params, **MOMENTUM, momentum_dtype=torch.float32)

    def go_on(params, opt):
        for step in range(2, 4):
            set_gradients(step, params)
            opt.step()

    params, opt = build()
    for step in range(2):
        set_gradients(step, params)
        opt.step()
    resumed_params, resumed = build()
    resumed.load_state_dict(reload(opt.state_dict()))
    for param, value in zip(resumed_params, params, strict=True):
        param.data.copy_(value.data)
    for buffer, value in zip(buffers(resumed), buffers(opt), strict=True):
        assert buffer.dtype == torch.float32
        assert identical(buffer, value)
    go_on(params, opt)
    go_on(resumed_params, resumed)
    for param, value in zip(resumed_params, params, strict=True):
        assert torch.equal(param, value)
    for buffer, value in zip(buffers(resumed), buffers(opt), strict=True):
        assert identical(buffer, value)


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
    "case",
    optim_error_inputs_func_sgd("cpu", torch.float32),
    ids=lambda case: case.optimizer_error_input.desc,
)
def test_refuses_what_torch_refuses(case):
    given = case.optimizer_error_input
    expect = pytest.warns if issubclass(case.error_type, Warning) else pytest.raises
    with expect(case.error_type, match=case.error_regex):
        MaskedSGD(given.params or parameters(), **given.kwargs)


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
