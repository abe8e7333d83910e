"""Hyperparameters as plain containers, to save and to compare when a run is resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


def described(value: Any) -> Any:
    """Numbers, text, and containers of them: schedules and criteria by their names and fields.

    Functions are known by their qualified names alone: what they compute is not compared.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: described(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(name): described(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)
