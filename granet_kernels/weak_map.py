"""Values that belong to tensors and live as long as they do."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Generic, TypeVar

from torch import Tensor

V = TypeVar("V")


class WeakTensorMap(Generic[V]):
    """A dict by tensor identity that keeps no tensor alive.

    torch's own ``WeakIdKeyDictionary`` hashes and compares in Python. What is looked up for every
    parameter at every step, between tensors that have swept the caches, waits for memory at each of
    these lines.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], V]] = {}

    def get(self, tensor: Tensor) -> V | None:
        """The value of this very tensor; None if it has none."""
        entry = self._entries.get(id(tensor))
        return None if entry is None or entry[0]() is not tensor else entry[1]

    def __setitem__(self, tensor: Tensor, value: V) -> None:
        key = id(tensor)
        self._entries[key] = (weakref.ref(tensor, partial(self._died, key)), value)

    def pop(self, tensor: Tensor) -> None:
        """Forget the value of a tensor, if it has one."""
        self._entries.pop(id(tensor), None)

    def __len__(self) -> int:
        return len(self._entries)

    def _died(self, key: int, dead: weakref.ref[Tensor]) -> None:
        """Drop the value of a tensor that has died, unless its id has a new owner by now."""
        entry = self._entries.get(key)
        if entry is not None and entry[0] is dead:
            del self._entries[key]
