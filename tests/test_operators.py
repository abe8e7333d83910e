"""Every operator of every backend against the reference: one body for all (see granet_kernels.selftest)."""

import types

import pytest
import torch
from torch.library import opcheck

from granet_kernels import Backend, register_backend, selftest, use_backend
from granet_kernels.backends import reference
from granet_kernels.ops import OPERATORS, registry

COMPUTED = [
    (operator, backend) for operator in OPERATORS for backend in selftest.backends_with(operator)
]


@pytest.mark.parametrize(("operator", "backend"), COMPUTED, ids=str)
def test_equals_reference(operator, backend):
    outcome = selftest.check(operator, backend, "cpu")
    assert outcome.cases > 0
    assert outcome.failures == ()


@pytest.mark.gpu
@pytest.mark.parametrize("operator", OPERATORS)
def test_equals_reference_on_gpu(operator):
    for backend in selftest.backends_with(operator, "cuda"):
        assert selftest.check(operator, backend, "cuda").failures == ()


@pytest.mark.parametrize("operator", OPERATORS)
def test_fake_has_the_form_of_the_results(operator):
    """Shape, dtype and strides, by which code is compiled before anything is computed."""
    for case in selftest.cases(operator):
        forms = []
        for device in ("cpu", "meta"):
            args, kwargs = case.arguments(device)
            with use_backend("reference"), torch.no_grad():
                results = getattr(torch.ops.granet, operator)(*args, **kwargs)
            forms.append([selftest._form(tensor) for tensor in selftest._tensors(results)])
        assert forms[0] == forms[1], case


def has_nan(args):
    return any(tensor.isnan().any() for tensor in selftest._tensors(args))


@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(operator):
    """Schema, fake and functionalization, on the first, a middle and the last case of each operator."""
    comparable = [case for case in selftest.cases(operator) if not has_nan(case.args)]  # NaN != NaN
    for case in {comparable[0], comparable[len(comparable) // 2], comparable[-1]}:
        args, kwargs = case.arguments("cpu")
        opcheck(getattr(torch.ops.granet, operator).default, args, kwargs)


@pytest.mark.parametrize("operator", OPERATORS)
def test_reads_no_more_than_it_writes(operator):
    """The reference computes the same twice, and inputs that the schema does not mark stay as they are."""
    schema = getattr(torch.ops.granet, operator).default._schema
    for case in selftest.cases(operator):
        args, _ = case.arguments("cpu")
        before, kwargs = case.arguments("cpu")
        with use_backend("reference"), torch.no_grad():
            getattr(torch.ops.granet, operator)(*args, **kwargs)
        for argument, value, old in zip(schema.arguments, args, before, strict=False):
            if argument.is_write:
                continue
            for tensor, saved in zip(selftest._tensors(value), selftest._tensors(old), strict=True):
                assert selftest.compare(tensor, saved, saved, 0) is None, (
                    f"{case}: {argument.name} changed"
                )


@pytest.fixture
def broken_backend():
    """A backend whose every operator is almost right; the argument says how it is wrong."""
    module = types.ModuleType("broken")
    module.__all__ = []
    registry.register_backend(Backend(name="broken", module="broken", devices=("cpu",)))
    registry._loaded["broken"] = module
    yield module
    del registry._backends["broken"], registry._loaded["broken"]
    registry._resolved.clear()


def drops_one_too_many(weights, masks, k, momenta):
    reference.prune_(weights, masks, (k - 1).clamp(min=0), momenta)


def leaves_minus_zero(tensors, masks):
    reference.zero_inactive_(tensors, masks)
    for tensor in tensors:
        tensor[tensor == 0] = -0.0


def rounds_through_half(input, weight, mask, bias):
    return reference.masked_linear(input, weight.half().to(weight.dtype), mask, bias)


def updates_inactive(params, grads, momenta, masks, **options):
    reference.masked_sgd_(
        params, grads, momenta, [torch.full_like(m, 255) for m in masks], **options
    )


@pytest.mark.parametrize(
    ("operator", "function"),
    [
        ("prune_", drops_one_too_many),
        ("zero_inactive_", leaves_minus_zero),
        ("masked_linear", rounds_through_half),
        ("masked_sgd_", updates_inactive),
    ],
)
def test_selftest_catches(broken_backend, operator, function):
    """The comparison is worth what it finds: planted faults must show."""
    setattr(broken_backend, operator, function)
    broken_backend.__all__ = [operator]
    assert selftest.check(operator, "broken", "cpu").failures


def test_selftest_reports_a_crash(broken_backend):
    broken_backend.pack_mask = lambda mask: 1 / 0
    broken_backend.__all__ = ["pack_mask"]
    failures = selftest.check("pack_mask", "broken", "cpu").failures
    assert "ZeroDivisionError" in failures[0]


def test_registered_backend_computes(broken_backend):
    """What CONTRIBUTING says of adding a backend."""
    broken_backend.pack_mask = lambda mask: torch.full((16,), 7, dtype=torch.uint8)
    broken_backend.__all__ = ["pack_mask"]
    with use_backend("broken"):
        assert torch.ops.granet.pack_mask(torch.ones(3, dtype=torch.bool)).tolist() == [7] * 16
    register_backend(Backend(name="broken", module="no.such.module", devices=("cpu",)))
    assert (
        "no.such" in registry.backend_status()["broken"]
        or "No module" in registry.backend_status()["broken"]
    )
