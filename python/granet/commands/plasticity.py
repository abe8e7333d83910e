"""The command `granet plasticity`: its flags, its table and its plot."""

from __future__ import annotations

import argparse
import dataclasses

from granet import recipes
from granet.commands.flags import add_flags, flags_given
from granet.commands.tables import show
from granet.training.config import GROUPS, TrainConfig, build_config
from granet.training.telemetry import Table

TABLE, PLOT = "plasticity.csv", "plasticity.png"
SHOWN = "epoch lr rate criterion regenerated sparsity plasticity final_plasticity"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The study's flags, then those of the network and its training."""
    parser.usage = "granet plasticity --prune-epochs N,N [STUDY] [SETTINGS]"
    parser.description = (
        "Prune copies of a dense network at chosen epochs, train them on, and write how well they "
        "recover: a table and a plot."
    )
    study = parser.add_argument_group("study")
    study.add_argument(
        "--prune-epochs", required=True, metavar="N,N", help="epochs at which copies are pruned"
    )
    study.add_argument("--rates", default="0.5,0.9,0.98", metavar="X,X", help="shares pruned")
    study.add_argument(
        "--criteria",
        default="uniform,global",
        metavar="NAME,NAME",
        help="some of uniform, global, filter, random (default: uniform,global)",
    )
    study.add_argument(
        "--regeneration",
        choices=("both", "with", "without"),
        default="both",
        help="whether copies exchange weights after the prune",
    )
    study.add_argument(
        "--recover-epochs",
        type=int,
        default=30,
        metavar="N",
        help="epochs at the learning rate in force (default: 30)",
    )
    study.add_argument(
        "-c", "--config", metavar="NAME", help="YAML file of settings, or a recipe (granet recipes)"
    )
    study.add_argument(
        "--drop-fraction",
        type=float,
        default=argparse.SUPPRESS,
        metavar="X",
        help="share of the active weights that regeneration exchanges (default: 0.5)",
    )
    add_flags(parser, [title for title in GROUPS if title != "sparsity"])


def run(args: argparse.Namespace) -> int:
    """Measure, and write the table and the plot; the exit status."""
    from granet.plasticity import Measurement, Study, measure, plot  # needs the train extra

    file = recipes.read(args.config) if args.config else {}
    config = build_config(file, flags_given(args), {"method": "dense"})
    config = _named(config)
    study = Study(
        epochs=tuple(int(part) for part in _parts("prune_epochs", args.prune_epochs, int)),
        rates=tuple(_parts("rates", args.rates, float)),
        criteria=tuple(args.criteria.split(",")),
        regeneration={"both": (False, True), "with": (True,), "without": (False,)}[
            args.regeneration
        ],
        recover_epochs=args.recover_epochs,
        drop_fraction=0.5 if config.drop_fraction is None else config.drop_fraction,
    )
    directory = config.run_directory
    directory.mkdir(parents=True, exist_ok=True)
    table = Table(directory / TABLE, Measurement, key="epoch", until=-1)
    measured = []
    for measurement in measure(config, study, report=print):
        measured.append(measurement)
        table.append(measurement)
    names = SHOWN.split()
    show(names, [[_cell(getattr(m, name)) for name in names] for m in measured])
    plot(measured, directory / PLOT)
    print(f"{directory / TABLE}, {directory / PLOT}")
    return 0


def _named(config: TrainConfig) -> TrainConfig:
    if config.experiment is not None:
        return config
    name = f"{config.dataset}-{config.model}-plasticity-{config.seed}"
    return dataclasses.replace(config, experiment=name)


def _parts(name: str, text: str, kind: type[int] | type[float]) -> list[float]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}: expected numbers between commas, got {text!r}") from None


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
