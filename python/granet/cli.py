"""The `granet` command: its subcommands, and its exit statuses.

0: done. 1: `granet check` found a mismatch. 2: bad input, in one line on stderr. 130 and 143:
training was stopped by Ctrl-C or SIGTERM, and can be resumed.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from granet.commands.user_errors import user_errors

COMMANDS = {
    "train": "train a network, sparse or dense",
    "check": "compare every operator with the reference",
    "methods": "list the methods of sparse training, and their settings",
    "export": "write a run's network: dense, compact, compressed, ONNX",
    "inspect": "what is in a checkpoint, and whether it is in order",
    "plan": "what a run would be, layer by layer",
    "recipes": "list the settings that granet train -c knows by name",
    "plasticity": "measure how networks recover from being pruned",
    "sweep": "train methods x sparsities x seeds, and compare them in a table",
    "bench": "how fast a network is, dense and sparse, beside the machine",
    "report": "compare runs in a table, or on a page",
}
"""Subcommand, which is a module of `granet.commands` -> what it is for.

Only the module of the command that is called is imported: most need the train extra."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `granet` with these arguments (those of the process by default); the exit status."""
    words = sys.argv[1:] if argv is None else argv
    called = next((word for word in words if word in COMMANDS), "")
    try:
        with user_errors(called):
            parser = make_parser(called)
        args, unknown = parser.parse_known_args(words)
        unknown = _take_settings(args, unknown)
        if unknown:
            print(f"granet {called}: error: {_unknown(unknown[0], called)}", file=sys.stderr)
            return 2
        # Training tells the user's errors from its own by itself.
        with nullcontext() if called == "train" else user_errors(called):
            return _module(called).run(args)  # type: ignore[no-any-return]
    except KeyboardInterrupt:  # before there was anything to resume, or a second time
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def make_parser(called: str | None = None) -> argparse.ArgumentParser:
    """The parser of the program; only the subcommand `called` has its arguments, or all without it."""
    parser = argparse.ArgumentParser(prog="granet", description="Sparse training for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, title in COMMANDS.items():
        command = commands.add_parser(name, help=title)
        if called in (name, None):
            _module(name).add_arguments(command)
    return parser


def _module(command: str) -> Any:
    return importlib.import_module(f"granet.commands.{command}")


def _take_settings(args: argparse.Namespace, unknown: list[str]) -> list[str]:
    """Give the KEY=VALUE among them to `args`, and return the rest.

    argparse wants positional arguments in one place, and leaves those between flags over.
    """
    settings = [word for word in unknown if "=" in word and not word.startswith("-")]
    if not hasattr(args, "settings"):
        return unknown
    args.settings += settings
    return [word for word in unknown if word not in settings]


def _unknown(argument: str, command: str) -> str:
    """What is wrong with an argument that the parser of `command` does not know."""
    parser = argparse.ArgumentParser()
    _module(command).add_arguments(parser)
    flags = [flag for action in parser._actions for flag in action.option_strings]
    close = difflib.get_close_matches(argument.split("=")[0], flags, n=3)
    hint = f"; close: {', '.join(close)}" if close else ""
    return f"unknown argument {argument!r}{hint}"
