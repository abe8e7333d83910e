"""Times and hyperparameters as functions of the step.

A schedule is a frozen callable from the number of successful optimizer steps so far to a float. It
holds no state, so resuming a run needs nothing but the step counter. A curve is what a ramp follows
on the way from its initial to its final value: a rising function from [0, 1] to [0, 1].
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from granet.distributions import active_fraction

Schedule = Callable[[int], float]
Curve = Callable[[float], float]
"""Share of the rise, from the share of a ramp's updates; the ends are 0 and 1 whatever it returns."""

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
        _check_decay(self.initial, self.floor, self.total_steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearDecay:
    """A straight line from `initial` to `floor`, which holds after `total_steps`."""

    initial: float
    """Value at step 0, in [floor, 1]."""
    total_steps: int
    """Step at which `floor` is reached, at least 1."""
    floor: float = 0.0
    """Last value, in [0, 1]."""

    def __call__(self, step: int) -> float:
        left = max(self.total_steps - step, 0) / self.total_steps
        return min(self.floor + (self.initial - self.floor) * left, self.initial)

    def __post_init__(self) -> None:
        _check_decay(self.initial, self.floor, self.total_steps)


DROP_SCHEDULES = ("cosine", "linear", "constant")


def as_drop_schedule(
    drop_fraction: float | Schedule, kind: str, total_steps: int, *, cosine_floor: float = 0.005
) -> Schedule:
    """The share of active weights that updates replace, over a run: a schedule as it is, or from a number.

    Args:
        drop_fraction: at step 0, in [0, 1]; or a schedule.
        kind: one of `DROP_SCHEDULES`.
        total_steps: length of the decay.
        cosine_floor: where the cosine ends; 0.005 in the code published with GraNet.

    Raises:
        ValueError: no schedule has this name, or `drop_fraction` is out of range.
    """
    if kind not in DROP_SCHEDULES:
        known = ", ".join(DROP_SCHEDULES)
        raise ValueError(f"drop_schedule: expected one of {known}, got {kind!r}")
    if callable(drop_fraction):
        return drop_fraction
    _check_fraction("drop_fraction", drop_fraction)
    if kind == "constant":
        return Constant(value=drop_fraction)
    if kind == "linear":
        return LinearDecay(initial=drop_fraction, total_steps=total_steps)
    floor = min(cosine_floor, drop_fraction)
    return CosineDecay(initial=drop_fraction, total_steps=total_steps, floor=floor)


def cubic(progress: float) -> float:
    """Fast at first, slow at the end (Zhu & Gupta, 2017)."""
    remaining = 1.0 - progress
    return 1.0 - remaining * remaining * remaining


def linear(progress: float) -> float:
    """The same amount at every update."""
    return progress


def cosine(progress: float) -> float:
    """Half a cosine: slow at both ends."""
    return 0.5 - 0.5 * math.cos(math.pi * progress)


def sigmoid(progress: float) -> float:
    """The logistic function between -6 and 6: slower at both ends than the cosine."""
    lowest = _logistic(-6.0)
    return (_logistic(12.0 * progress - 6.0) - lowest) / (1.0 - 2.0 * lowest)


def _logistic(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def constant(progress: float) -> float:
    """All at the first update."""
    return 1.0


CURVES: Mapping[str, Curve] = {
    "cubic": cubic,
    "linear": linear,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "constant": constant,
}
"""What ramps take by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ramp:
    """Sparsity in force after an update at `step`, rising from `initial` to `final` along a curve.

    With the cubic curve ``final + (initial - final) * (1 - progress) ** 3`` (Zhu & Gupta, 2017;
    GraNet, Eq. 1). Progress counts updates: the update at step ``every * i`` has progress ``(i -
    first) / n``. The ramp stays within its ends, and the update at ``floor(end / every)`` gives
    `final` itself.

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
    curve: str | Curve = "cubic"
    """A key of `CURVES`, or a function."""
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
        curve = self.curve if callable(self.curve) else CURVES[self.curve]
        risen = min(max(curve((update - first) / (last - first)), 0.0), 1.0)
        # The minimum keeps the rounded difference from lifting a value past `final`.
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
        if not callable(self.curve) and self.curve not in CURVES:
            known = ", ".join(CURVES)
            raise ValueError(f"ramp: expected one of {known}, or a function, got {self.curve!r}")
        if self.official_rounding and self.curve not in ("cubic", cubic):
            raise ValueError(
                f"ramp: expected 'cubic' with official_rounding=True, got {self.curve!r}"
            )
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


def updates(
    total_steps: int,
    every: int | str,
    *,
    start: int = 0,
    until: int,
    official_rounding: bool = False,
) -> UpdateClock:
    """The clock of a run that updates its masks from one step to another.

    The run's last step is no update, for what regrows there would stay zero; the published code
    does not mind.
    """
    every = as_interval(every, total_steps)
    last = total_steps if official_rounding else total_steps - 1
    return UpdateClock(every=every, start=start, stop=max(min(until, last) + 1, start))


def as_interval(every: int | str, total_steps: int) -> int:
    """Steps between updates; a share of a run that is less than a step is one."""
    if isinstance(every, str):
        return max(as_step(every, total_steps, "update_every"), 1)
    if _as_int("update_every", every, "a number of steps") < 1:
        raise ValueError(f"update_every: expected at least 1 step, got {every}")
    return every


def never() -> UpdateClock:
    """The clock of masks that stay as they are."""
    return UpdateClock(every=1, start=0, stop=0)


def gradual(
    initial: float,
    final: float,
    *,
    total_steps: int,
    every: int | str,
    prune_from: int | str,
    prune_until: int | str,
    curve: str | Curve,
    official_rounding: bool,
) -> tuple[Ramp, UpdateClock]:
    """The ramp of a run, from a time to a time, and its clock, which goes on to the end.

    Raises:
        ValueError: a value is out of range, or no update falls into the ramp.
    """
    check_sparsities(initial, final)
    start = as_step(prune_from, total_steps, "prune_from")
    until = as_step(prune_until, total_steps, "prune_until")
    clock = updates(
        total_steps, every, start=start, until=total_steps, official_rounding=official_rounding
    )
    last = total_steps if official_rounding else total_steps - 1
    ramp = Ramp(
        initial=initial,
        final=final,
        begin=start,
        end=min(until, last),
        every=clock.every,
        curve=curve,
        official_rounding=official_rounding,
    )
    return ramp, clock


def check_sparsities(initial: float, final: float) -> None:
    """Raise ValueError unless a run may begin with the one and end with the other."""
    for name, value in (("initial_sparsity", initial), ("sparsity", final)):
        _check_sparsity(name, value)
    if initial > final:
        raise ValueError(f"initial_sparsity: expected at most sparsity, {final}, got {initial}")


def _as_int(name: str, value: object, expected: str) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    try:
        return operator.index(value)  # type: ignore[arg-type]  # the call is the check
    except TypeError:
        raise TypeError(f"{name}: expected {expected}, got {value!r}") from None


def _check_decay(initial: float, floor: float, total_steps: int) -> None:
    _check_fraction("floor", floor)
    _check_positive("total_steps", total_steps)
    _check_fraction("initial", initial)
    if initial < floor:
        raise ValueError(
            f"initial: expected a number in [floor={floor}, 1], got {initial} "
            "(use Constant for a value that does not decay)"
        )


def _check_positive(name: str, value: int) -> None:
    if _as_int(name, value, "an integer of at least 1") < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value}")


def _check_step(name: str, value: int) -> None:
    if _as_int(name, value, "a step of at least 0") < 0:
        raise ValueError(f"{name}: expected a step of at least 0, got {value}")


def _check_fraction(name: str, value: float) -> None:
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")


def _check_sparsity(name: str, value: float) -> None:
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
