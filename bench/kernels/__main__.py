"""`python -m bench.kernels`: compile every kernel for every target, and print what came out."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

OUT = Path("bench/results/kernels")


def capability_of_card() -> int:
    """80 of an A100, in a process of its own: those that compile are forked from this one."""
    code = "import torch; print(*torch.cuda.get_device_capability(), sep='')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(run.stdout)


def main(argv: list[str] | None = None) -> int:
    """Returns 1 where a kernel is not what is promised, 2 for wrong usage, 0 otherwise."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("error: TRITON_INTERPRET=1: nothing would be compiled", file=sys.stderr)
        return 2
    from bench.kernels import report
    from bench.kernels.launches import TARGETS

    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=report.CALLS, default=list(report.CALLS))
    parser.add_argument("--target", nargs="+", type=int, choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--card", action="store_true", help="for the GPU of this machine alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument(
        "--out", type=Path, help=f"CSV; {OUT}/triton-<version>.csv, where everything is compiled"
    )
    args = parser.parse_args(argv)
    if args.card:
        args.target = [capability_of_card()]
    print(report.line())
    rows = report.all_rows(
        args.only, args.target, args.jobs, lambda row: print(report.line(row), flush=True)
    )
    print(report.summary(rows))
    is_all = set(args.only) == set(report.CALLS) and set(args.target) == set(TARGETS)
    out = args.out or (OUT / f"triton-{rows[0].triton}.csv" if is_all else None)
    if out is not None:
        report.write_csv(out, rows)
        print(f"written: {out}")
    return 1 if any(row.faults for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
