"""Sparse training with GraNet on the kernels of :mod:`granet_kernels`."""

from granet.engine import Sparsifier
from granet.methods import METHODS, GraNet

__all__ = ["METHODS", "GraNet", "Sparsifier"]
