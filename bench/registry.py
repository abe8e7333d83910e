"""The table of yardsticks: one frozen row for each thing that is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from bench import resnet50

GROUPS = ("bandwidth", "step", "compiled", "selection", "training")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a row is built for."""

    device: torch.device
    quick: bool = False
    """Toy sizes: whether everything runs, not how fast."""
    cache_bytes: int = 0
    """The device's last-level cache; 0 where inputs need no rotation."""
    seed: int = 0

    @property
    def size(self) -> resnet50.Size:
        """The network whose tensors are used."""
        return resnet50.TOY if self.quick else resnet50.RESNET50


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A row made ready to run: inputs are on the device, `run` does the work once."""

    run: Callable[[], object]
    n_tensors: int
    n_weights: int
    model_bytes: int = 0
    """Bytes the work must move by its own account; 0 where bytes are not what limits it."""
    account: str = ""
    """How `model_bytes` comes about."""
    items: int = 0
    """Images in a call; 0 where there are none."""
    copies: int = 1
    """Sets of inputs that consecutive calls of `run` go through in turn."""
    reset: Callable[[], object] | None = None
    """Restores what `run` spends; not timed."""
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    """What calls of `run` happen in, such as the choice of a backend; entering it is not timed."""


class UnavailableError(RuntimeError):
    """A row's `build` lacks something optional: it is left out, with the reason, and nothing has failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Yardstick:
    """One row of the table."""

    group: str
    """Rows of a group are measured together, in one process, in turn."""
    name: str
    """What is measured: rows of one name do the same job."""
    variant: str
    """Who does it."""
    build: Callable[[Setting], Case]
    dtype: str = "float32"
    sparsity: float | None = None
    """Of the masks; None where there are none."""
    baseline: str = ""
    """`name/variant` of the row, in the same group and dtype, that the time is divided by."""
    graph: bool = False
    """Also replay it from a CUDA graph: the device's time without the host's."""
    cuda_only: bool = False

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"group: expected one of {', '.join(GROUPS)}, got {self.group!r}")

    @property
    def id(self) -> str:
        """`name/variant`, as `baseline` and the command line name it."""
        return f"{self.name}/{self.variant}"

    @property
    def key(self) -> tuple[str, str, str, str, float | None]:
        """What tells it from every other row."""
        return (self.group, self.name, self.variant, self.dtype, self.sparsity)


_TABLE: dict[tuple[str, str, str, str, float | None], Yardstick] = {}


def register(*rows: Yardstick) -> None:
    """Adds rows to the table; a row that is there already is refused."""
    for row in rows:
        if row.key in _TABLE:
            raise ValueError(f"rows: {row.group}/{row.id} ({row.dtype}) is registered already")
        _TABLE[row.key] = row


def registered() -> tuple[Yardstick, ...]:
    """All rows in the order of their registration."""
    return tuple(_TABLE.values())


def select(
    rows: Sequence[Yardstick],
    *,
    group: str | None = None,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> list[Yardstick]:
    """Rows of `group` whose id matches a glob in `only` (all, if empty) and none in `exclude`."""
    return [
        row
        for row in rows
        if group in (None, row.group)
        and (not only or any(fnmatchcase(row.id, glob) for glob in only))
        and not any(fnmatchcase(row.id, glob) for glob in exclude)
    ]
