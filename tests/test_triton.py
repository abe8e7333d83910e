"""The Triton kernels, run by Triton's interpreter on CPU tensors.

The interpreter has to be chosen before triton is imported, so the operators' tests run on this
backend in processes of their own, and with them ``triton_interpreted.py``: what concerns Triton alone.
"""

import pytest

from tests.backend_processes import assert_listed, assert_passed, pytest_processes

FILES = (
    "tests/test_mask.py",
    "tests/test_sgd.py",
    "tests/test_select.py",
    "tests/test_update_operator.py",
    "tests/test_operators.py",
    "tests/triton_interpreted.py",
    "tests/triton_accounts.py",
    "tests/triton_select.py",
)


@pytest.fixture(scope="module")
def processes():
    chosen = {"TRITON_INTERPRET": "1", "GRANET_TEST_BACKENDS": "triton"}
    with pytest_processes(FILES, **chosen) as started:
        yield started


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_interpreted(processes, file):
    assert_passed(processes[file])


@pytest.mark.slow
def test_granet_check_lists_it():
    """With nothing of the tests around it; those operators that convert numbers."""
    operators = ("count_active", "mask_cast", "mask_grad", "masked_sgd_", "masked_linear")
    result = "ok, in Triton's interpreter"
    assert_listed("triton", operators, result, TRITON_INTERPRET="1")
