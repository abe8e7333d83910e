"""Checks of a sparsifier's saved state, all of them before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from granet.placement import Layer
from granet_kernels import BitMask

ENGINE_KEYS = {"frozen_at", "due", "updated", "growth", "method"}


def checked_masks(masks: Mapping[str, Tensor], layers: Mapping[str, Layer]) -> dict[str, BitMask]:
    """The saved masks of layers, in row-major order.

    Raises:
        ValueError: they are of other layers or shapes.
    """
    check_equal("layers", list(masks), list(layers))
    checked = {}
    for name, layer in layers.items():
        try:
            checked[name] = BitMask.from_canonical(masks[name], layer.weight.shape)
        except (AttributeError, ValueError) as error:
            raise ValueError(f"state: masks[{name!r}]: {error}") from None
    return checked


def checked_engine(
    engine: Mapping[str, Any], layers: Mapping[str, Layer], grows: bool
) -> Mapping[str, Any]:
    """The engine's own entries.

    Raises:
        ValueError: one is missing or of another kind, or running means are of other layers.
    """
    if not isinstance(engine, Mapping) or ENGINE_KEYS - engine.keys():
        raise ValueError(
            f"state: expected an engine entry with {sorted(ENGINE_KEYS)}, got {engine!r:.99}"
        )
    for name in ("frozen_at", "due"):
        if engine[name] is not None:
            check_step(f"engine[{name!r}]", engine[name])
    check_step("engine['updated']", engine["updated"])
    growth = engine["growth"]
    if not isinstance(growth, Mapping) or (growth and not grows):
        raise ValueError(
            f"state: expected {'means' if grows else 'nothing'} of growth, got {growth!r:.99}"
        )
    for name, mean in growth.items():
        if name not in layers or not isinstance(mean, Tensor):
            raise ValueError(f"state: expected growth of {', '.join(layers)}, got {name!r}")
        if mean.shape != layers[name].weight.shape:
            raise ValueError(
                f"state: growth[{name!r}]: expected shape {tuple(layers[name].weight.shape)}, got "
                f"{tuple(mean.shape)}"
            )
    return engine


def check_step(name: str, step: object, last: int | None = None) -> None:
    """Raise ValueError unless a saved number is a step of the run."""
    expected = "0 and above" if last is None else f"0 to {last}"
    in_range = isinstance(step, int) and not isinstance(step, bool) and step >= 0
    if not in_range or (last is not None and step > last):  # type: ignore[operator]
        raise ValueError(f"state: expected {name} from {expected}, got {step!r}")


def check_equal(name: str, got: object, expected: object) -> None:
    """Raise ValueError where a saved value is not this run's."""
    if got != expected:
        raise ValueError(f"state: expected {name} {expected!r}, got {got!r}")
