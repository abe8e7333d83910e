"""What `granet_kernels.keep_freed_memory()` gains: processes that keep take turns with ones that do not.

python -m bench.cpu.kept_memory                              all cases; writes kept-memory.csv
python -m bench.cpu.kept_memory CASE ROLE THREADS freed|kept   one process; prints its rows as JSON
"""

from __future__ import annotations

import csv
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.cpu import host
from bench.cpu.layers import CONTIGUOUS, OURS, make_data, role, training
from bench.cpu.networks import (
    RESNET18,
    RESNET50,
    SPARSIFIED,
    TRAINING_STEP,
    Network,
    dense_run,
    sparse_run,
)
from bench.cpu.peak import ROOT, peak_mib
from bench.cpu.race import Run
from bench.cpu.shapes import ConvShape
from bench.cpu.targets import DENSE
from granet_kernels import keep_freed_memory

Row = dict[str, object]
FREED, KEPT = "freed", "kept"
SETTINGS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Variables that would change what freed memory is."""
PROCESSES = 3
"""Of each kind, of each case."""
NETWORK_SPARSITY, LAYER_SPARSITY = 0.9, 0.98
CASES: dict[str, ConvShape | Network] = {
    str(case): case
    for case in (
        ConvShape(64, 256, 56, 1, 1, 32),
        ConvShape(256, 64, 56, 1, 1, 32),
        RESNET18,
        RESNET50,
    )
}
ROLES = (DENSE, OURS)
RESULTS = ROOT / "bench" / "results"


def build(case: ConvShape | Network, who: str) -> Run:
    """One contender: layers contiguous, networks channels_last."""
    if isinstance(case, ConvShape):
        wanted = (DENSE if who == DENSE else role(OURS, LAYER_SPARSITY), CONTIGUOUS)
        contenders = training(make_data(case), (LAYER_SPARSITY,))
        return next(c for c in contenders if c.key == wanted).build()
    if who == DENSE:
        return dense_run(case, TRAINING_STEP, "channels_last")
    sparse = (NETWORK_SPARSITY, "uniform", "channels_last", SPARSIFIED)
    return sparse_run(case, TRAINING_STEP, *sparse)


def faults() -> int:
    """Pages that the system has cleared for this process, or found for it in a cache of its own."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def measured(title: str, who: str, threads: int, memory: str) -> list[Row]:
    """In this process: a row for each measure."""
    if memory == KEPT and not keep_freed_memory():
        sys.exit("this C library has no setting for freed memory")
    torch.set_num_threads(threads)
    case = CASES[title]
    run = build(case, who)
    for _ in range(3):
        run()
    before = faults()
    taken = [run() for _ in range(9 if isinstance(case, ConvShape) else 3)]
    shared: Row = {"case": title, "contender": who, "threads": threads, "memory": memory}
    shared |= {"faults": (faults() - before) // len(taken), "peak_mib": round(peak_mib())}
    return [
        {
            **shared,
            "measure": measure,
            "median_ms": statistics.median(t[measure] for t in taken) * 1e3,
        }
        for measure in taken[0]
    ]


def in_a_process(*arguments: str) -> list[Row]:
    """What another process of this program measured."""
    environment = {n: v for n, v in os.environ.items() if not n.startswith(SETTINGS)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    command = [sys.executable, "-m", "bench.cpu.kept_memory", *arguments]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    found: list[Row] = json.loads(answer.stdout)
    return found


def all_rows(threads: int) -> Iterator[Row]:
    """Layers on one thread and on all, networks on all."""
    for title, case in CASES.items():
        for number in sorted({1, threads}) if isinstance(case, ConvShape) else [threads]:
            for process in range(PROCESSES):
                for who in ROLES:
                    for memory in (FREED, KEPT) if process % 2 == 0 else (KEPT, FREED):
                        for row in in_a_process(title, who, str(number), memory):
                            yield {"process": process, **row}


def write(path: Path, table: list[Row]) -> None:
    """After every row: a run that is cut short keeps what it has."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def main(arguments: list[str]) -> None:
    if arguments:
        title, who, threads, memory = arguments
        print(json.dumps(measured(title, who, int(threads), memory)))
        return
    all_threads = torch.get_num_threads()
    columns = host.describe(all_threads, kept=False)
    del columns["memory"]  # a row's
    path = RESULTS / host.folder_name() / "kept-memory.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    done: list[Row] = []
    for row in all_rows(all_threads):
        print(row, flush=True)
        done.append(row)
        write(path, [{**row, **columns} for row in done])


if __name__ == "__main__":
    main(sys.argv[1:])
