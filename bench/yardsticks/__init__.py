"""The yardsticks, a file a group, and our operators beside them. Importing this registers all of them."""

from bench.yardsticks import (
    bandwidth,
    cub,
    masked_selection,
    masked_step,
    masked_training,
    selection,
    step,
    training,
)

__all__ = [
    "bandwidth",
    "cub",
    "masked_selection",
    "masked_step",
    "masked_training",
    "selection",
    "step",
    "training",
]
