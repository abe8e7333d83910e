"""The yardsticks, a file a group, and our operators beside them. Importing this registers all of them."""

from bench.yardsticks import bandwidth, masked, selection, step, training

__all__ = ["bandwidth", "masked", "selection", "step", "training"]
