"""Sparse-training methods, a page each: a choice of criteria and schedules; the engine does the rest."""

from granet.engine import Sparsifier
from granet.methods.granet import GraNet

METHODS: dict[str, type[Sparsifier]] = {"granet": GraNet}

__all__ = ["METHODS", "GraNet"]
