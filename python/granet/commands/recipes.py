"""`granet recipes`: the settings that `granet train -c` knows by name."""

from __future__ import annotations

import argparse

from granet.recipes import names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has none."""


def run(args: argparse.Namespace) -> int:
    """Print the list; the exit status."""
    width = max(map(len, names()))
    for name, title in names().items():
        print(f"{name:<{width}}  {title}")
    print("\ngranet train -c cifar10-resnet50 -c granet sparsity=0.95 data_dir=DIR")
    return 0
