"""What the measurements ran on: the columns that every row of a run shares."""

from __future__ import annotations

import os
from datetime import UTC, datetime

import torch

from bench.machine import slug, version_of
from granet.host import cpu_name, cpuinfo


def processor() -> str:
    """`AMD EPYC, family 26`: a virtual machine's name alone may hide the generation.

    Most of Intel's are of one family, 6, and told apart by their model.
    """
    kind, field = "family", "cpu family"
    if cpuinfo("vendor_id") == "GenuineIntel":
        kind = field = "model"
    number = cpuinfo(field)
    return f"{cpu_name()}, {kind} {number}" if number else cpu_name()


def folder_name() -> str:
    """`cpu-amd-epyc-family-26`: where results of this machine are kept."""
    return slug(f"cpu {processor()}")


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe(threads: int, *, kept: bool) -> dict[str, object]:
    """Columns of the CSV; `threads` is what a run on all cores uses, `kept` whether freed memory is.

    `load_before` is how many processes wanted a core in the minute before: much above 0, and the
    figures are those of a shared machine.
    """
    return {
        "cpu": processor(),
        "cores": cores(),
        "all_threads": threads,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "isa_limit": os.environ.get("GRANET_CPU_CAPABILITY", ""),
        "torch": str(torch.__version__),
        "numpy": version_of("numpy"),
        "sparseprop": version_of("sparseprop"),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else "",
        "memory": "kept" if kept else "",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
