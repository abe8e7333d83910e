"""The `granet` command: its subcommands, what it says of bad input, its exit statuses.

0: done. 1: `granet check` found a mismatch. 2: bad input, in one line on stderr. 130 and 143:
training was stopped by Ctrl-C or SIGTERM, and can be resumed.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from granet import (
    catalogue,
    check,
    export_command,
    inspect_checkpoint,
    plan,
    plasticity_command,
    recipes,
    report,
    sweep,
)
from granet.checkpoint import Checkpoint, load_checkpoint
from granet.config import TrainConfig, build_config, field_types
from granet.flags import add_config_flags, add_flags, flags_given, parse_settings
from granet.stopping import Stopped
from granet.telemetry import LAST

TRAIN_EPILOG = """\
later ones win: the defaults, the checkpoint that is resumed, the files and recipes of -c in their order,
KEY=VALUE, the flags

examples:
  granet train                                   digits to 90 % sparsity
  granet train --method dense                    the same network, dense
  granet train --method rigl                     another method: see granet methods
  granet train --sparsity 0.95 --experiment deep
  granet train -c runs/deep/args.yaml --seed 1 --experiment deep-1
  granet train -c cifar10-vgg19 -c rigl sparsity=0.95 data_dir=DIR
  granet train --resume runs/deep              what was interrupted
  granet report runs/*
"""


COMMANDS = {
    "check": check,
    "export": export_command,
    "inspect": inspect_checkpoint,
    "methods": catalogue,
    "plan": plan,
    "plasticity": plasticity_command,
    "recipes": recipes,
    "report": report,
    "sweep": sweep,
}
"""Modules of the subcommands besides train; each has a `run`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `granet` with these arguments (those of the process by default); the exit status."""
    args, unknown = make_parser().parse_known_args(argv)
    if unknown:
        print(f"granet {args.command}: error: {_unknown(unknown[0])}", file=sys.stderr)
        return 2
    try:
        if args.command == "train":
            return _train(args)
        with _user_errors(args.command):
            return COMMANDS[args.command].run(args)  # type: ignore[no-any-return]
    except KeyboardInterrupt:  # before there was anything to resume, or a second time
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _unknown(argument: str) -> str:
    """What is wrong with an argument that no parser knows."""
    flags = [f"--{name.replace('_', '-')}" for name in field_types()]
    close = difflib.get_close_matches(argument.split("=")[0], flags, n=3)
    hint = f"; close: {', '.join(close)}" if close else ""
    return f"unknown argument {argument!r}{hint}"


def make_parser() -> argparse.ArgumentParser:
    """The parser of every subcommand."""
    parser = argparse.ArgumentParser(prog="granet", description="Sparse training for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        usage="granet train [-c NAME] [--resume [PATH]] [--stop-after STEPS] [SETTINGS] [KEY=VALUE ...]",
        help="train a network, sparse or dense",
        description="Train a network on images, sparse or dense. What a run leaves is in its "
        "directory: checkpoints, metrics.csv, args.yaml, summary.yaml, TensorBoard events.",
        epilog=TRAIN_EPILOG,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    _add_invocation_flags(train)
    add_flags(train)
    check.add_arguments(
        commands.add_parser("check", help="compare every operator with the reference")
    )
    catalogue.add_arguments(
        commands.add_parser(
            "methods", help="list the methods of sparse training, and their settings"
        )
    )
    export_command.add_arguments(
        commands.add_parser(
            "export", help="write a run's network: dense, compact, compressed, ONNX"
        )
    )
    inspect_checkpoint.add_arguments(
        commands.add_parser("inspect", help="what is in a checkpoint, and whether it is in order")
    )
    plan.add_arguments(
        commands.add_parser(
            "plan",
            usage="granet plan [-c NAME] [SETTINGS] [KEY=VALUE ...]",
            help="what a run would be, layer by layer",
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
    )
    commands.add_parser("recipes", help="list the settings that granet train -c knows by name")
    plasticity_command.add_arguments(
        commands.add_parser(
            "plasticity",
            usage="granet plasticity --prune-epochs N,N [STUDY] [SETTINGS]",
            help="measure how networks recover from being pruned",
            description="Prune copies of a dense network at chosen epochs, train them on, and write "
            "how well they recover: a table and a plot.",
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
    )
    sweep.add_arguments(
        commands.add_parser(
            "sweep",
            usage="granet sweep [SWEEP] [-c NAME] [SETTINGS] [KEY=VALUE ...]",
            help="train methods x sparsities x seeds, and compare them in a table",
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
    )
    report.add_arguments(
        commands.add_parser(
            "report",
            help="compare runs in a table",
            description="Compare runs in a table; runs that differ in the seed alone share a row.",
        )
    )
    return parser


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Wide enough for a flag and its help to share a line; the epilog as it is written."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text == TRAIN_EPILOG:
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


def _add_invocation_flags(parser: argparse.ArgumentParser) -> None:
    """Flags about this invocation, which are no part of the run's configuration."""
    add_config_flags(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="Continue a run from a checkpoint or run directory; without PATH, the run that "
        "the other settings name",
    )
    parser.add_argument(
        "--stop-after", type=int, metavar="STEPS", help="Stop, resumably, after so many steps"
    )


def _train(args: argparse.Namespace) -> int:
    from granet import train  # needs the train extra, which `granet check` does without

    with ExitStack() as surroundings:
        with _user_errors("train"):
            config, checkpoint = settings(args)
            processes = surroundings.enter_context(train.surroundings(config))
            trainer = train.Trainer(
                config, processes, resume=checkpoint, stop_after=args.stop_after
            )
        # Outside: an error in the middle of training is not the user's, and deserves its traceback.
        try:
            trainer.run()
        except Stopped as stop:
            if processes.is_first:
                print(stop, file=sys.stderr)
            return 0 if stop.signal_number is None else 128 + stop.signal_number
    return 0


def settings(args: argparse.Namespace) -> tuple[TrainConfig, Checkpoint | None]:
    """Configuration of the run, and the checkpoint it continues from."""
    file = {k: v for name in args.config for k, v in recipes.read(name).items()}
    flags = parse_settings(args.settings) | flags_given(args)
    if args.resume is None:
        return build_config(file, flags), None
    path = Path(args.resume) if args.resume else build_config(file, flags).run_directory
    checkpoint = load_checkpoint(path / LAST if path.is_dir() or not args.resume else path)
    config = build_config(dataclasses.asdict(checkpoint.config), file, flags)
    return _in_directory(config, checkpoint.path.parent, flags), checkpoint


def _in_directory(config: TrainConfig, directory: Path, flags: dict[str, object]) -> TrainConfig:
    """`config` with the names of the directory that is continued, which may have been moved."""
    named = {"output", "experiment"} & flags.keys()
    if named and config.run_directory.resolve() != directory.resolve():
        raise ValueError(
            f"resume: expected a checkpoint in {config.run_directory}, which --output and "
            f"--experiment name, got one in {directory}"
        )
    return dataclasses.replace(config, output=str(directory.parent), experiment=directory.name)


@contextmanager
def _user_errors(command: str) -> Iterator[None]:
    """Bad input becomes one line, and exit status 2."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
    except ImportError as error:
        message = f"{error}; pip install --no-build-isolation '.[train]' brings what is missing"
    else:
        return
    print(f"granet {command}: error: {message}", file=sys.stderr)
    raise SystemExit(2)
