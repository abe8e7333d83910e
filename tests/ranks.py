"""Starting several processes of one training, by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def run_ranks(case: str, count: int, directory: Path, *, restarts: int = 0) -> None:
    """Run a case of :mod:`tests.rank_cases` with so many processes on the CPU."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count),
        "--max-restarts", str(restarts), "-m", "tests.rank_cases", case, str(directory),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GRANET_BACKEND": "reference"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-20_000:]


def result_of(directory: Path, name: str = "result.pt") -> dict[str, Any]:
    """What rank 0 left."""
    result: dict[str, Any] = torch.load(directory / name, weights_only=True)
    return result
