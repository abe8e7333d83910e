"""granet check."""

import argparse
import types

import pytest
import torch

from granet.commands import check
from granet_kernels import Backend
from granet_kernels.backends import reference
from granet_kernels.ops import OPERATORS, registry


@pytest.fixture
def bad_backend():
    """All operators right but one."""
    module = types.ModuleType("bad")
    for operator in OPERATORS:
        setattr(module, operator, getattr(reference, operator))
    module.__all__ = list(OPERATORS)
    module.count_active = lambda masks: torch.zeros(len(masks), dtype=torch.int64)
    registry.register_backend(Backend(name="bad", module="bad", devices=("cpu",)))
    registry._loaded["bad"] = module
    yield
    del registry._backends["bad"], registry._loaded["bad"]
    registry._resolved.clear()


def run(*flags):
    parser = argparse.ArgumentParser()
    check.add_arguments(parser)
    return check.run(parser.parse_args(flags))


def test_all_is_well(capsys):
    assert run() == 0
    printed = capsys.readouterr().out
    for operator in OPERATORS:
        assert any(
            line.split()[:3] == ["reference", "cpu", operator] and line.endswith("ok")
            for line in printed.splitlines()
        )


def test_a_mismatch_is_shown_and_fails(bad_backend, capsys):
    assert run("-v") == 1
    printed = capsys.readouterr().out
    assert "MISMATCHES" in printed
    assert "bad: count_active-sizes: tensor 0" in printed


def test_an_unavailable_backend_is_listed_with_the_reason(capsys):
    registry.register_backend(Backend(name="absent", module="not.installed", devices=("cpu",)))
    try:
        assert run() == 0
    finally:
        del registry._backends["absent"]
        registry._loaded.pop("absent", None)
        registry._resolved.clear()
    assert "not available: No module named 'not'" in capsys.readouterr().out


def test_a_backend_without_its_device_is_listed(bad_backend, capsys):
    registry.register_backend(Backend(name="bad", module="bad", devices=("toaster",)))
    registry._loaded["bad"] = types.ModuleType("bad")
    assert run() == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "bad - all - no toaster device here" in lines
