"""MaskedSGD over a run's life: saved, copied, moved to another memory format."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from granet_kernels import MaskedSGD, attach_mask, attached_mask, sparsify
from granet_kernels.layout import full_mask
from tests.optimizer_twins import (
    MASKED,
    MOMENTUM,
    SGD,
    backend,
    buffers,
    generator,
    identical,
    parameters,
    set_gradients,
    train,
    twins,
)

__all__ = ["backend"]


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


# ---- moved to another memory format --------------------------------------------------------------


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
