"""The command `granet train`: its flags, the settings they amount to, how a run is left."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from contextlib import ExitStack
from pathlib import Path

from granet.commands.flags import (
    add_config_flags,
    add_flags,
    settings_given,
    settings_typed,
)
from granet.commands.user_errors import user_errors
from granet.training.checkpoint import Checkpoint, load_checkpoint
from granet.training.config import TrainConfig, build_config
from granet.training.processes import Processes
from granet.training.stopping import Stopped
from granet.training.telemetry import BEST, LAST

EPILOG = """\
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags about this invocation, then those of the run's configuration."""
    parser.usage = (
        "granet train [-c NAME] [--resume [PATH]] [--stop-after STEPS] [SETTINGS] [KEY=VALUE ...]"
    )
    parser.description = (
        "Train a network on images, sparse or dense. What a run leaves is in its directory: "
        "checkpoints, metrics.csv, args.yaml, summary.yaml, TensorBoard events."
    )
    parser.epilog = EPILOG
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
    parser.add_argument(
        "--eval-only",
        action="store_true",
        help="Evaluate the checkpoint of --resume (of a run directory its best) and change nothing",
    )
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Train, or evaluate; the exit status."""
    with ExitStack() as surroundings:
        with user_errors("train"):
            from granet.training import train

            config, checkpoint = settings(args)
            processes = surroundings.enter_context(train.surroundings(config))
            if args.eval_only:
                return _evaluate(config, checkpoint, processes)
        return _train(config, checkpoint, processes, args.stop_after)


def _train(
    config: TrainConfig,
    checkpoint: Checkpoint | None,
    processes: Processes,
    stop_after: int | None,
) -> int:
    """Train; the exit status."""
    with user_errors("train"):
        from granet.training.train import Trainer

        trainer = Trainer(config, processes, resume=checkpoint, stop_after=stop_after)
    # Outside: an error in the middle of training is not the user's, and deserves its traceback.
    try:
        trainer.run()
    except Stopped as stop:
        if processes.is_first:
            print(stop, file=sys.stderr)
        return 0 if stop.signal_number is None else 128 + stop.signal_number
    return 0


def _evaluate(config: TrainConfig, checkpoint: Checkpoint | None, processes: Processes) -> int:
    """Print what a checkpoint's network is worth; the exit status."""
    from granet.training.evaluate import evaluate

    if checkpoint is None:
        raise ValueError("eval-only: expected a checkpoint or run directory, as --resume PATH")
    results = evaluate(config, checkpoint, processes)
    if processes.is_first:
        epoch = checkpoint.entries["progress"]["epoch"]
        print(f"{checkpoint.path}, epoch {epoch}")
        for split, (loss, accuracy) in results.items():
            print(f"{split:<4}  loss {loss:.4f}  accuracy {accuracy:.2f} %")
    return 0


def settings(args: argparse.Namespace) -> tuple[TrainConfig, Checkpoint | None]:
    """Configuration of the run, and the checkpoint it continues from."""
    given = settings_given(args)
    if args.resume is None:
        return build_config(given), None
    path = Path(args.resume) if args.resume else build_config(given).run_directory
    if path.is_dir() or not args.resume:
        is_best = args.eval_only and (path / BEST).is_file()
        path = path / (BEST if is_best else LAST)
    checkpoint = load_checkpoint(path)
    config = build_config(dataclasses.asdict(checkpoint.config), given)
    return _in_directory(config, checkpoint.path.parent, settings_typed(args)), checkpoint


def _in_directory(config: TrainConfig, directory: Path, flags: dict[str, object]) -> TrainConfig:
    """`config` with the names of the directory that is continued, which may have been moved."""
    named = {"output", "experiment"} & flags.keys()
    if named and config.run_directory.resolve() != directory.resolve():
        raise ValueError(
            f"resume: expected a checkpoint in {config.run_directory}, which --output and "
            f"--experiment name, got one in {directory}"
        )
    return dataclasses.replace(config, output=str(directory.parent), experiment=directory.name)
