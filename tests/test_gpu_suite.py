"""bench/gpu_suite.sh without a GPU: what it refuses, and that its summary is written whatever happens."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def started(*arguments, **environment):
    environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = ["bash", "bench/gpu_suite.sh", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **streams)


def suite(*arguments, **environment):
    process = started(*arguments, **environment)
    stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def test_suite_says_that_there_is_no_gpu(tmp_path):
    answer = suite(str(tmp_path / "out"), CUDA_VISIBLE_DEVICES="")
    assert (answer.returncode, answer.stdout) == (3, "")
    assert "no CUDA device" in answer.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "add --quick"),
        (["--device"], "an option lacks its value"),
        (["--device", "tpu"], "--device: expected cuda or cpu, got 'tpu'"),
        (["--stages", "biuld"], "--stages: expected some of environment build"),
        (["one", "two"], "expected one OUT"),
    ],
)
def test_suite_refuses(arguments, message):
    answer = suite(*arguments)
    assert answer.returncode == 2
    assert message in answer.stderr


def test_suite_summarizes_when_interrupted(tmp_path):
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "granet.py").write_text("import time\nprint('sleeping', flush=True)\ntime.sleep(100)\n")
    out = tmp_path / "out"
    stages = ["--stages", "check,bandwidth"]
    process = started("--device", "cpu", "--quick", *stages, str(out), PYTHONPATH=str(fake))
    try:
        log = out / "suite.log"
        while not (log.exists() and "sleeping" in log.read_text()) and process.poll() is None:
            time.sleep(0.1)
        process.terminate()
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    with (out / "stages.csv").open() as file:
        outcomes = [(row["stage"], row["outcome"]) for row in csv.DictReader(file)]
    assert outcomes == [("check", "interrupted")]
    summary = (out / "summary.txt").read_text()
    assert summary in stdout
    assert "interrupted" in summary
    assert "sleeping" in summary


def test_suite_goes_on_after_a_failure(tmp_path):
    out, fake = tmp_path / "out", tmp_path / "fake"
    fake.mkdir()
    (fake / "granet.py").write_text("raise SystemExit('planted failure')\n")
    stages = ["--stages", "check,bandwidth"]
    answer = suite("--device", "cpu", "--quick", *stages, str(out), PYTHONPATH=str(fake))
    assert answer.returncode == 1, answer.stderr
    with (out / "stages.csv").open() as file:
        outcomes = [(row["stage"], row["outcome"]) for row in csv.DictReader(file)]
    assert outcomes == [("check", "failed"), ("bandwidth", "passed")]
    files = ["stages.csv", "suite.log", "summary.txt", "yardsticks.csv"]
    assert sorted(path.name for path in out.iterdir()) == files
    summary = (out / "summary.txt").read_text()
    assert summary in answer.stdout
    assert "planted failure" in summary
    assert "512MiB" in summary
