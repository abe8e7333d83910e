"""The CUDA kernels, compiled as C++ and run on the host (tests/simt): the operators' tests on CPU tensors.

Which library the backend loads is settled when it is imported, so the tests run in processes of their
own, and with them ``cuda_host_run.py``: what concerns this backend alone.
"""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from tests.backend_processes import ROOT, assert_listed, assert_passed, pytest_processes
from tests.simt import build

FILES = (
    "tests/test_mask.py",
    "tests/test_sgd.py",
    "tests/test_select.py",
    "tests/test_update_operator.py",
    "tests/test_operators.py",
    "tests/cuda_host_run.py",
    "tests/cuda_select.py",
)


@pytest.fixture(scope="module")
def built():
    """The libraries, up to date."""
    command = [sys.executable, "-m", "tests.simt.build"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def processes(built):
    with pytest_processes(FILES, GRANET_SIMT="1", GRANET_TEST_BACKENDS="cuda") as started:
        yield started


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_run_on_the_host(processes, file):
    assert_passed(processes[file])


@pytest.mark.slow
def test_granet_check_lists_it(built):
    """With nothing of the tests around it."""
    operators = ("count_active", "mask_cast", "masked_sgd_", "prune_")
    assert_listed("cuda", operators, "ok, in tests/simt on the host", GRANET_SIMT="1")


@pytest.fixture
def simt(built):
    """The module for NumPy arrays."""
    spec = importlib.util.spec_from_file_location("granet_simt", build.MODULE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    module.take_turns("forward")


@pytest.mark.slow
@pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
@pytest.mark.parametrize("numel", [0, 1, 1000, 1024, 9000, 70_001])
def test_on_numpy_arrays_in_any_order(simt, order, numel):
    """Which thread goes first must not matter."""
    simt.take_turns(order, seed=numel, resident=3)
    random = np.random.default_rng(numel)
    mask = random.random(numel) < 0.2
    packed = simt.pack_mask(mask.astype(np.uint8))
    assert np.array_equal(np.unpackbits(packed, bitorder="little")[:numel].astype(bool), mask)
    assert np.array_equal(simt.unpack_mask(packed, numel).astype(bool), mask)
    assert simt.count_active(packed) == mask.sum()

    weight, grad, velocity, average = random.normal(size=(4, numel)).astype(np.float32)
    alone = weight.copy(), velocity.copy()
    wanted_velocity = np.where(mask, 0.9 * velocity + grad + 0.01 * weight, velocity)
    wanted = np.where(mask, weight - 0.1 * wanted_velocity, weight)
    simt.masked_sgd(weight, grad, velocity, packed, lr=0.1, momentum=0.9, weight_decay=0.01)
    np.testing.assert_allclose(velocity, wanted_velocity, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(weight, wanted, rtol=1e-6, atol=1e-6)

    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "average_decay": 0.75}
    wanted_average = np.where(mask, average + 0.25 * (wanted - average), average)
    simt.masked_sgd(alone[0], grad, alone[1], packed, average=average, **options)
    np.testing.assert_allclose(average, wanted_average, rtol=1e-6, atol=1e-6)
    assert np.array_equal(average[~mask], wanted_average[~mask].astype(np.float32))
    assert np.array_equal(alone[0], weight)
    assert np.array_equal(alone[1], velocity)

    assert np.array_equal(weight[~mask], wanted[~mask].astype(np.float32))
    simt.zero_inactive(weight, packed)
    assert np.array_equal(weight != 0, mask)


def test_arrays_are_not_copied_behind_the_callers_back(simt):
    packed = simt.pack_mask(np.ones(4, dtype=np.uint8))
    with pytest.raises(TypeError, match="incompatible function arguments"):
        simt.zero_inactive(np.ones(4), packed)  # float64
    with pytest.raises(ValueError, match="packed: expected 32 bytes, got 16"):
        simt.zero_inactive(np.ones(200, dtype=np.float32), packed)
