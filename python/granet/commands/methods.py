"""`granet methods`: what there is to train with, where it comes from, and the settings of each."""

from __future__ import annotations

import argparse
import inspect

from granet.methods import METHODS
from granet.training.method_arguments import ARGUMENTS, method_parameters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="one of them, with its settings")


def run(args: argparse.Namespace) -> int:
    """Print the list, or one method's page; the exit status."""
    if args.name is None:
        print("\n".join(listing()))
    elif args.name in METHODS:
        print("\n".join(page(args.name)))
    else:
        raise ValueError(f"name: expected one of {', '.join(METHODS)}, got {args.name!r}")
    return 0


def listing() -> list[str]:
    """A line for each method: its name, its summary, and below it the source."""
    width = max(map(len, METHODS))
    lines = []
    for name, method in METHODS.items():
        lines += [f"{name:<{width}}  {_summary(method)}", f"{'':<{width}}  {method.source}"]
    return lines


def page(name: str) -> list[str]:
    """A method's description, source, and settings as `granet train` takes them."""
    doc = inspect.cleandoc(METHODS[name].__doc__ or "").split("\nArgs:")[0].rstrip()
    method = METHODS[name]
    lines = [name, "", doc, "", method.source, "", f"from granet import {method.__name__}", ""]
    lines.append("settings of granet train, the class's arguments, and their defaults:")
    for flag, default in settings(name).items():
        lines.append(f"  --{flag.replace('_', '-'):<20}{ARGUMENTS[flag]:<20}{default}")
    return lines


def settings(name: str) -> dict[str, object]:
    """Fields of a configuration that a method has, with the defaults of its class."""
    parameters = method_parameters(name)
    return {
        flag: parameters[argument].default
        for flag, argument in ARGUMENTS.items()
        if argument in parameters and flag != "erk_power"
    }


def _summary(method: type) -> str:
    return inspect.cleandoc(method.__doc__ or "").splitlines()[0]
