"""Sparse-training methods, a page each: a choice of criteria and schedules; the engine does the rest."""

from granet.engine import Sparsifier
from granet.methods.gmp import GMP
from granet.methods.granet import GraNet
from granet.methods.grasp import GraSP
from granet.methods.lottery_ticket import LotteryTicket
from granet.methods.one_shot import OneShot
from granet.methods.rigl import RigL, RigLITOP
from granet.methods.set import SET
from granet.methods.snip import SNIP
from granet.methods.static import StaticRandom
from granet.methods.synflow import SynFlow

_ALL: tuple[type[Sparsifier], ...] = (
    GraNet,
    GMP,
    RigL,
    RigLITOP,
    SET,
    StaticRandom,
    SNIP,
    GraSP,
    SynFlow,
    LotteryTicket,
    OneShot,
)

METHODS: dict[str, type[Sparsifier]] = {method.name: method for method in _ALL}
"""By name. A method of your own is put in here, and ``granet train --method`` knows it."""

__all__ = [
    "GMP",
    "METHODS",
    "SET",
    "SNIP",
    "GraNet",
    "GraSP",
    "LotteryTicket",
    "OneShot",
    "RigL",
    "RigLITOP",
    "StaticRandom",
    "SynFlow",
]
