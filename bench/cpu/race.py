"""Racing: contenders take turns, round by round, in one process, and are compared within a round.

A machine's speed drifts over seconds, by a tenth and more where others share it. Two contenders that
run one after the other within a round have met the same machine, so the figure is the median over
rounds of the ratio of a round, not the ratio of two medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from granet.throughput.stopwatch import spread

Seconds = Mapping[str, float]
"""What one run took, by the name of the measure ("forward", "forward+backward")."""
Run = Callable[[], Seconds]

# Shorter turns than this are repeated: the clock, the scheduler and cold caches would show in them.
LEAST_TURN = 2e-3
# A variant of a role that the first run finds this much slower than the best one leaves the race.
HOPELESS = 1.3


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """One way to do a job. Rows compare roles; the fastest variant of a role stands for it."""

    role: str
    variant: str
    build: Callable[[], Run]
    """Called once, in the order of the list; memory of a variant that leaves the race is freed."""

    @property
    def key(self) -> tuple[str, str]:
        return (self.role, self.variant)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two roles in one measure; milliseconds are medians, `speedup` is baseline over ours."""

    baseline_variant: str
    baseline_ms: float
    ours_variant: str
    ours_ms: float
    speedup: float
    speedup_p20: float
    speedup_p80: float
    rounds: int


def whole(
    measure: str, call: Callable[[], object], reset: Callable[[], object] | None = None
) -> Run:
    """A run that is one call; `reset` restores, untimed, what the call before it spent."""

    def run() -> Seconds:
        if reset is not None:
            reset()
        start = time.perf_counter()
        call()
        return {measure: time.perf_counter() - start}

    return run


@dataclass(slots=True)
class _Entrant:
    """A contender in the race; `times` has one number a round for each measure."""

    contender: Contender
    run: Run
    once: Seconds
    repeats: int = 1
    times: dict[str, list[float]] | None = None

    def turn(self) -> None:
        """Runs `repeats` times and notes the mean of each measure."""
        sums: dict[str, float] = {}
        for _ in range(self.repeats):
            for measure, seconds in self.run().items():
                sums[measure] = sums.get(measure, 0.0) + seconds
        self.times = self.times or {}
        for measure, seconds in sums.items():
            self.times.setdefault(measure, []).append(seconds / self.repeats)


class Race:
    """Warms the contenders up, then times them in turn: one call of `round` is one turn of each.

    A contender that cannot be built or run is left out, its exception is in `failures`.
    """

    def __init__(self, contenders: Sequence[Contender]) -> None:
        keys = [contender.key for contender in contenders]
        if len(set(keys)) != len(keys):
            raise ValueError(f"contenders: expected distinct roles and variants, got {keys}")
        self._waiting = list(contenders)
        self._entrants: list[_Entrant] = []
        self._rounds = 0
        self.failures: dict[tuple[str, str], Exception] = {}

    def warm_up(self) -> None:
        """Builds every contender and runs it; of variants of a role, drops the hopeless ones."""
        for contender in self._waiting:
            try:
                self._enter(contender)
            except Exception as error:  # whatever a baseline raises is a result
                self.failures[contender.key] = error
        self._waiting = []

    def _enter(self, contender: Contender) -> None:
        entrant = _Entrant(contender, contender.build(), {})
        entrant.once = entrant.run()
        # The first run pays for what is created on first use. Where that could be much of it, again.
        if _total(entrant.once) < 0.1:
            entrant.once = entrant.run()
        entrant.repeats = max(1, min(100, round(LEAST_TURN / max(_total(entrant.once), 1e-6))))
        rivals = [e for e in self._entrants if e.contender.role == contender.role]
        if any(_hopeless(entrant.once, rival.once) for rival in rivals):
            return
        for rival in rivals:
            if _hopeless(rival.once, entrant.once):
                self._entrants.remove(rival)
        self._entrants.append(entrant)

    @property
    def seconds_a_round(self) -> float:
        """What a round is expected to take, after the warm-up."""
        return sum(_total(entrant.once) * entrant.repeats for entrant in self._entrants)

    def round(self) -> None:
        """One turn of each contender; every round starts with the next one."""
        first = self._rounds % max(1, len(self._entrants))
        for entrant in self._entrants[first:] + self._entrants[:first]:
            entrant.turn()
        self._rounds += 1

    def medians(self) -> dict[str, float]:
        """Milliseconds of every contender still in the race, by "role variant measure"."""
        return {
            f"{entrant.contender.role} {entrant.contender.variant} {measure}": _median_ms(times)
            for entrant in self._entrants
            for measure, times in (entrant.times or {}).items()
        }

    def compare(self, baseline: str, ours: str, measure: str) -> Comparison | None:
        """The best variant of one role against the best of another; None where one has none."""
        slow, fast = self._best(baseline, measure), self._best(ours, measure)
        if slow is None or fast is None:
            return None
        base_times, own_times = (entrant.times or {} for entrant in (slow, fast))
        ratios = [
            base / own for base, own in zip(base_times[measure], own_times[measure], strict=True)
        ]
        low, high = spread(ratios)
        return Comparison(
            baseline_variant=slow.contender.variant,
            baseline_ms=_median_ms(base_times[measure]),
            ours_variant=fast.contender.variant,
            ours_ms=_median_ms(own_times[measure]),
            speedup=statistics.median(ratios),
            speedup_p20=low,
            speedup_p80=high,
            rounds=len(ratios),
        )

    def failure(self, role: str) -> str:
        """Why no variant of a role was in the race; "" where one was."""
        if any(entrant.contender.role == role for entrant in self._entrants):
            return ""
        reasons = [
            f"{type(error).__name__}: {error}"
            for (failed, _), error in self.failures.items()
            if failed == role
        ]
        return " ".join("; ".join(reasons).split())[:200]

    def has(self, role: str) -> bool:
        """Whether a variant of the role was entered, in the race still or failed."""
        entered = [*(e.contender for e in self._entrants), *self._waiting]
        return any(c.role == role for c in entered) or any(r == role for r, _ in self.failures)

    def _best(self, role: str, measure: str) -> _Entrant | None:
        variants = [
            entrant
            for entrant in self._entrants
            if entrant.contender.role == role and measure in (entrant.times or {})
        ]
        return min(
            variants, key=lambda e: statistics.median((e.times or {})[measure]), default=None
        )


def _total(once: Seconds) -> float:
    """The longest measure: the others are parts of it."""
    return max(once.values())


def _hopeless(once: Seconds, rival: Seconds) -> bool:
    """Slower by `HOPELESS` in every measure that both have."""
    return all(seconds > HOPELESS * rival.get(name, seconds) for name, seconds in once.items())


def _median_ms(times: Sequence[float]) -> float:
    return statistics.median(times) * 1e3
