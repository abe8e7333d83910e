"""`python -m bench`: measure one group of yardsticks, describe the machine, print a table."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import bench.yardsticks  # noqa: F401 (registers the rows)
from bench import machine, records, registry, targets
from bench.runner import run_rows
from bench.timing import FULL, QUICK

OK, FAILED, NO_DEVICE = 0, 1, 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("--device", choices=("cuda", "cpu"), default="cuda")

    measure = commands.add_parser("measure", parents=[device], help="measure rows into a CSV")
    measure.add_argument("--group", choices=registry.GROUPS, help="rows of this group alone")
    measure.add_argument("--only", nargs="+", default=[], metavar="GLOB", help="by name/variant")
    measure.add_argument("--exclude", nargs="+", default=[], metavar="GLOB")
    measure.add_argument("--quick", action="store_true", help="toy sizes: does it run?")
    until = "start no new round after this time, in seconds since 1970"
    measure.add_argument("--until", type=float, help=until)
    measure.add_argument("--out", type=Path, required=True, help="CSV that rows are added to")

    commands.add_parser("slug", parents=[device], help="the device's name, fit for a folder")
    environment = commands.add_parser("environment", parents=[device], help="the machine, as JSON")
    environment.add_argument("--out", type=Path, required=True)
    table = commands.add_parser("table", help="print a CSV")
    table.add_argument("csv", type=Path)
    judged = commands.add_parser("targets", help="hold a CSV against the targets")
    judged.add_argument("csv", type=Path)
    commands.add_parser("list", help="print all rows there are")
    return parser


def _measure(args: argparse.Namespace) -> int:
    device = machine.find_device(args.device)
    rows = registry.select(
        registry.registered(), group=args.group, only=args.only, exclude=args.exclude
    )
    if not rows:
        raise ValueError("only: no row matches; `python -m bench list` prints them")
    setting = registry.Setting(
        device=device, quick=args.quick, cache_bytes=machine.cache_bytes(device)
    )
    effort = QUICK if args.quick else FULL
    if args.until is not None:
        effort = dataclasses.replace(effort, until=args.until)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    measured: list[records.Row] = []
    begin = time.monotonic()
    for part in run_rows(rows, setting, effort):
        records.append_csv(args.out, part)
        measured += part
        print(f"{time.monotonic() - begin:6.1f} s  {part[0].name}", flush=True)
    missing = [row for row in measured if row.median_ms is None]
    failures = [row for row in missing if row.has_failed]
    print(
        f"{len(measured) - len(missing)} rows measured, {len(failures)} failed, "
        f"{len(missing) - len(failures)} left out"
    )
    for row in missing:
        print(f"  {row.name}/{row.variant} ({row.mode}, {row.dtype}): {row.note}")
    return FAILED if failures else OK


def _environment(args: argparse.Namespace) -> int:
    record = machine.describe(machine.find_device(args.device))
    args.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    print(f"not importable here: {', '.join(machine.missing_packages()) or 'none'}")
    return OK


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        match args.command:
            case "measure":
                return _measure(args)
            case "environment":
                return _environment(args)
            case "slug":
                print(machine.slug(machine.device_name(machine.find_device(args.device))))
            case "table":
                print(records.table(records.read_csv(args.csv)))
            case "targets":
                print(targets.verdicts(records.read_csv(args.csv)))
            case "list":
                for row in registry.registered():
                    print(f"{row.group:10} {row.id:32} {row.dtype}")
    except machine.NoDeviceError as error:
        print(error, file=sys.stderr)
        return NO_DEVICE
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return OK


if __name__ == "__main__":
    sys.exit(main())
