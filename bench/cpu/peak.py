"""Peak memory of a whole network, in a process of its own: `measure` starts one and asks it.

python -m bench.cpu.peak resnet18 "training step" channels_last [sparsify|compress [SPARSITY]]
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

from bench.cpu.networks import (
    QUICK_RESNET18,
    RESNET18,
    RESNET50,
    RESNET50_ALONE,
    Network,
    Task,
    dense_run,
    sparse_run,
)

ROOT = Path(__file__).resolve().parents[2]
NETWORKS = {
    str(network): network for network in (RESNET18, RESNET50, RESNET50_ALONE, QUICK_RESNET18)
}


@functools.cache
def measure(
    network: Network, task: Task, memory_format: str, threads: int, *sparse: str
) -> float | None:
    """MiB at the peak of two runs, Python and torch included; None where the process failed.

    `sparse` is nothing for the dense network, or `SPARSIFIED` or `COMPRESSED` and the sparsity.
    """
    command = [sys.executable, "-m", "bench.cpu.peak", str(network), task, memory_format, *sparse]
    paths = [str(ROOT), *sys.path]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": str(threads),
    }
    answer = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    return float(answer.stdout.split()[-1]) if answer.returncode == 0 else None


def peak_mib() -> float:
    """Of this process alone: getrusage() would carry the peak of the one that started it through exec."""
    status = Path("/proc/self/status").read_text()
    kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(kib) / 1024


def main(arguments: list[str]) -> None:
    """Runs the network twice and prints the peak in MiB."""
    title, task, memory_format, *sparse = arguments
    network = NETWORKS[title]
    assert task == "inference" or task == "training step"
    if sparse:
        run = sparse_run(network, task, float(sparse[1]), "uniform", memory_format, sparse[0])
    else:
        run = dense_run(network, task, memory_format)
    run()
    run()
    print(peak_mib())


if __name__ == "__main__":
    main(sys.argv[1:])
