"""Times and hyperparameters as functions of the step.

A schedule is a frozen callable from the number of successful optimizer steps so far to a float. It
holds no state, so resuming a run needs nothing but the step counter.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from granet.distributions import active_fraction

Schedule = Callable[[int], float]

_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")


def as_step(time: int | str, total_steps: int, name: str) -> int:
    """A time given in steps, or as a share of the run, in steps.

    Args:
        time: a step, or a percentage such as ``"50%"`` or ``"12.5%"``, rounded down to a step.
        total_steps: length of the run, at least 1.
        name: the argument that held `time`, for the error message.

    Returns:
        A step in [0, total_steps].

    Raises:
        TypeError: `time` is neither an integer nor a string.
        ValueError: `time` is malformed or outside the run.
    """
    _check_positive("total_steps", total_steps)
    if isinstance(time, str):
        match = _PERCENT.fullmatch(time.strip())
        if match is None:
            raise ValueError(f'{name}: expected a step or a percentage like "50%", got {time!r}')
        # Exact: in floats 0.29 * 100 is 28.999..., one step short.
        share = Fraction(match[1]) / 100
        if share > 1:
            raise ValueError(f"{name}: expected a percentage of at most 100%, got {time!r}")
        step = math.floor(total_steps * share)
    else:
        step = _as_int(name, time, 'a step or a percentage like "50%"')
    if not 0 <= step <= total_steps:
        raise ValueError(f"{name}: expected a step in [0, {total_steps}], got {time!r}")
    return step


@dataclass(frozen=True, kw_only=True, slots=True)
class Constant:
    """The same value at every step."""

    value: float
    """Any fraction in [0, 1]."""

    def __call__(self, step: int) -> float:
        return self.value

    def __post_init__(self) -> None:
        _check_fraction("value", self.value)


@dataclass(frozen=True, kw_only=True, slots=True)
class CosineDecay:
    """Half a cosine from `initial` down to `floor`: the drop fraction of RigL and GraNet.

    ``floor + (initial - floor) / 2 * (1 + cos(pi * step / total_steps))``, as in Evci et al.
    (2020), section 3, with the floor of the published GraNet code. Both ends are hit exactly, and
    `floor` holds after `total_steps`.
    """

    initial: float
    """Value at step 0, in [floor, 1]."""
    total_steps: int
    """Step at which `floor` is reached, at least 1."""
    floor: float = 0.005
    """Last value, in [0, 1]."""

    def __call__(self, step: int) -> float:
        if step <= 0:
            return self.initial
        share = 0.5 + 0.5 * math.cos(math.pi * min(step / self.total_steps, 1.0))
        # The rounded sum may pass `initial` by one unit in the last place.
        return min(self.floor + (self.initial - self.floor) * share, self.initial)

    def __post_init__(self) -> None:
        _check_fraction("floor", self.floor)
        _check_positive("total_steps", self.total_steps)
        _check_fraction("initial", self.initial)
        if self.initial < self.floor:
            raise ValueError(
                f"initial: expected a number in [floor={self.floor}, 1], got {self.initial} "
                "(use Constant for a value that does not decay)"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CubicRamp:
    """Sparsity in force after an update at `step`, rising from `initial` to `final`.

    ``final + (initial - final) * (1 - progress) ** 3`` (Zhu & Gupta, 2017; GraNet, Eq. 1), where
    progress counts updates: the update at step ``every * i`` has progress ``(i - first) / n``.
    The ramp never falls, and the update at ``floor(end / every)`` gives `final` itself.

    With `official_rounding` it is the published code's ramp, in that code's order of floating
    operations: its last prune is at progress ``(n - 1) / n``, so it stays short of `final` by
    ``(final - initial) / n ** 3``.
    """

    initial: float
    """Sparsity before the first prune, in [0, 1)."""
    final: float
    """Sparsity after the ramp, in [initial, 1)."""
    begin: int
    """Step at which the ramp starts; nothing is pruned at or before it."""
    end: int
    """Step at or before which the last prune happens."""
    every: int
    """Steps from one update to the next, at least 1."""
    official_rounding: bool = False
    """Reproduce the published code's updates and values instead of landing on `final`."""

    def __call__(self, step: int) -> float:
        first, last = self._indices()
        update = step // self.every
        if self.official_rounding:
            return self._official(min(max(update, first), last - 1) - first, last - first)
        if update >= last:
            return self.final
        if update <= first:
            return self.initial
        # Products and one division, each rounded correctly, keep the ramp monotone; the minimum
        # keeps the rounded difference below from lifting a value past `final`.
        remaining = (last - update) / (last - first)
        risen = 1.0 - remaining * remaining * remaining
        return min(self.initial + (self.final - self.initial) * risen, self.final)

    def prunes_at(self, step: int) -> bool:
        """Whether the update at `step` prunes."""
        if step <= 0 or step % self.every != 0:
            return False
        first, last = self._indices()
        update = step // self.every
        if self.official_rounding:
            return first <= update <= last - 1
        # A ramp of a single update index has no room to rise: it prunes once, to `final`.
        return first < update <= last or first == update == last

    def _indices(self) -> tuple[int, int]:
        """Update indices of progress 0 and progress 1."""
        first = self.begin // self.every if self.official_rounding else -(-self.begin // self.every)
        return first, self.end // self.every

    def _official(self, index: int, length: int) -> float:
        initial_active, final_active = active_fraction(self.initial), active_fraction(self.final)
        decay = (1 - index / length) ** 3
        return (1 - initial_active) + (initial_active - final_active) * (1 - decay)

    def __post_init__(self) -> None:
        _check_sparsity("initial", self.initial)
        _check_sparsity("final", self.final)
        if self.final < self.initial:
            raise ValueError(
                f"final: expected a sparsity of at least initial={self.initial}, got {self.final}"
            )
        _check_positive("every", self.every)
        _check_step("begin", self.begin)
        _check_step("end", self.end)
        first, last = self._indices()
        # The published ramp has none for n <= 1: index 0 is no update, or prunes to `initial`.
        holds_update = last - first >= 2 if self.official_rounding else last >= max(first, 1)
        if not holds_update:
            mode = " and official_rounding=True" if self.official_rounding else ""
            raise ValueError(
                f"prune_until: the ramp from step {self.begin} to {self.end} holds no update at "
                f"update_every={self.every}{mode}; expected a longer ramp or a smaller update_every"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateClock:
    """Which steps are updates: the multiples of `every` in [start, stop), step 0 excluded."""

    every: int
    """Steps from one update to the next, at least 1."""
    start: int
    """First step that may be an update."""
    stop: int
    """First step that may no longer be one."""

    def is_update(self, step: int) -> bool:
        """Whether the masks change after optimizer step `step`."""
        return step > 0 and step % self.every == 0 and self.start <= step < self.stop

    def __post_init__(self) -> None:
        _check_positive("every", self.every)
        _check_step("start", self.start)
        _check_step("stop", self.stop)
        if self.stop < self.start:
            raise ValueError(f"stop: expected a step of at least {self.start}, got {self.stop}")


def _as_int(name: str, value: object, expected: str) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    try:
        return operator.index(value)  # type: ignore[arg-type]  # the call is the check
    except TypeError:
        raise TypeError(f"{name}: expected {expected}, got {value!r}") from None


def _check_positive(name: str, value: int) -> None:
    if _as_int(name, value, "an integer of at least 1") < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value}")


def _check_step(name: str, value: int) -> None:
    if _as_int(name, value, "a step of at least 0") < 0:
        raise ValueError(f"{name}: expected a step of at least 0, got {value}")


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")


def _check_sparsity(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value}")
