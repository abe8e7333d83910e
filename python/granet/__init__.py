"""Sparse training: GraNet and its relatives, on the kernels of :mod:`granet_kernels`."""

from granet.engine import Sparsifier
from granet.methods import (
    GMP,
    METHODS,
    SET,
    SNIP,
    GraNet,
    GraSP,
    LotteryTicket,
    OneShot,
    RigL,
    RigLITOP,
    StaticRandom,
    SynFlow,
)

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
    "Sparsifier",
    "StaticRandom",
    "SynFlow",
]
