"""The Triton kernels, run by Triton's interpreter on CPU tensors.

The interpreter has to be chosen before triton is imported, so the operators' tests run on this
backend in processes of their own, and with them ``triton_interpreted.py``: what concerns Triton alone.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = (
    "tests/test_mask.py",
    "tests/test_sgd.py",
    "tests/test_select.py",
    "tests/test_operators.py",
    "tests/triton_interpreted.py",
    "tests/triton_accounts.py",
    "tests/triton_select.py",
)


@pytest.fixture(scope="module")
def processes():
    """All at once, for as many processors as there are."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "GRANET_TEST_BACKENDS": "triton"}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = {
        file: subprocess.Popen([*command, file], cwd=ROOT, env=environment, **streams)
        for file in FILES
    }
    yield started
    for process in started.values():  # those that no test has waited for
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_interpreted(processes, file):
    output, _ = processes[file].communicate()
    assert processes[file].returncode == 0, output
    assert " passed" in output
