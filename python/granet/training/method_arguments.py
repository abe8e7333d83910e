"""Which settings a method has, and the argument of its class that each of them becomes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping

from granet.methods import METHODS

ARGUMENTS: Mapping[str, str] = {
    "init_sparsity": "initial_sparsity",
    "prune_start": "prune_from",
    "prune_end": "prune_until",
    "ramp": "ramp",
    "distribution": "distribution",
    "erk_power": "distribution",
    "scope": "scope",
    "floor": "floor",
    "drop_fraction": "drop_fraction",
    "drop_schedule": "drop_schedule",
    "drop": "drop",
    "grow": "grow",
    "redistribution": "redistribution",
    "regrown": "regrown",
    "update_until": "update_until",
    "prune_at": "prune_at",
    "rounds": "rounds",
    "rewind_to": "rewind_to",
    "official_rounding": "official_rounding",
}
"""Fields that only some methods have, None (or False) where a method's own default holds, and the
argument that a method's class has for each: the flags are timm's and its relatives' words."""


@functools.cache
def method_parameters(method: str) -> Mapping[str, inspect.Parameter]:
    """Arguments of a method's class."""
    return inspect.signature(METHODS[method]).parameters
