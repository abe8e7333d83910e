"""Tests and `granet check` in processes of their own, where a backend must be chosen beforehand."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]

CHECK = """
import argparse, sys
from granet.commands import check
from granet_kernels import selftest
selftest.OPERATORS = sys.argv[1:]
sys.exit(check.run(argparse.Namespace(verbose=False)))
"""


@contextmanager
def pytest_processes(files, **environment):
    """pytest of each file, all at once, for as many processors as there are."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = {
        file: subprocess.Popen([*command, file], cwd=ROOT, env=os.environ | environment, **streams)
        for file in files
    }
    try:
        yield started
    finally:
        for process in started.values():  # those that no test has waited for
            if process.poll() is None:
                process.kill()
                process.communicate()


def assert_passed(process):
    """Waits for the process."""
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert " passed" in output


def assert_listed(backend, operators, result, **environment):
    """`granet check` of these operators is all well, and says so of the backend on the CPU."""
    run = subprocess.run(
        [sys.executable, "-c", CHECK, *operators],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    for operator in operators:
        assert any(
            line.split()[:3] == [backend, "cpu", operator] and line.endswith(result)
            for line in lines
        ), run.stdout
