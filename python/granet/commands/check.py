"""``granet check``: every operator on every backend and device present, against the reference.

It needs torch and numpy only, so that it runs wherever the kernels are installed.
"""

from __future__ import annotations

import argparse
import platform

import torch

from granet_kernels import build_info
from granet_kernels.selftest import Outcome, check_all, devices
from granet_kernels.selftest.layer_choices import BATCH, sparse_from

COLUMNS = "{:<10} {:<6} {:<23} {:>5}  {}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="list every mismatch, how the installation was built, and which layers are computed sparsely",
    )


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 if any operator differs from the reference, else 0."""
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, devices: {', '.join(devices())}"
    )
    if args.verbose:
        for name, value in (build_info()["native"] or {"native": "no compiled part"}).items():
            print(f"  {name}: {value}")
        print(f"layers on the CPU, batch {BATCH}, are computed sparsely")
        for name, sparsity in sparse_from():
            print(
                f"  {name}: {'never' if sparsity is None else f'from sparsity {sparsity:.1f} on'}"
            )
    print(COLUMNS.format("backend", "device", "operator", "cases", "result"))
    outcomes = check_all(lambda outcome: print(COLUMNS.format(*_row(outcome)), flush=True))
    failed = [outcome for outcome in outcomes if outcome.failures]
    for outcome in failed:
        shown = outcome.failures if args.verbose else outcome.failures[:1]
        for failure in shown:
            print(f"{outcome.backend}: {failure}")
    checked = sum(1 for outcome in outcomes if outcome.cases)
    print(f"{checked - len(failed)} of {checked} equal the reference")
    return 1 if failed else 0


def _row(outcome: Outcome) -> tuple[str, str, str, str, str]:
    result = outcome.note or "ok"
    if outcome.failures:
        result = f"{len(outcome.failures)} MISMATCHES"
    if outcome.runs_in:
        result += f", in {outcome.runs_in}"
    return (outcome.backend, outcome.device, outcome.operator, str(outcome.cases or "-"), result)
