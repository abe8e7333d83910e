"""The yardsticks, a file a group. Importing this package registers all of them."""

from bench.yardsticks import bandwidth, selection, step, training

__all__ = ["bandwidth", "selection", "step", "training"]
