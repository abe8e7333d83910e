"""Timing by turns: what is compared takes turns round by round, so that it meets the same machine.

A machine's speed drifts over seconds, by a tenth and more where others share it. So two things are
compared by the median over rounds of the ratio within a round, not by the ratio of their medians.
`torch.utils.benchmark.Timer` times one statement to its end before the next, and has no such rounds.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

MOST_CALLS = 1000
"""In one turn."""


def elapsed_ms(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds from the start of `work` until the device has finished it."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3
    before = torch.cuda.Event(enable_timing=True)
    after = torch.cuda.Event(enable_timing=True)
    before.record()
    work()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after))


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    least_ms: float,
) -> dict[str, list[float]]:
    """Milliseconds a call of each of `calls`, one number a round.

    Each is called twice beforehand. Every round starts with the next one; a turn shorter than
    `least_ms` is filled with more calls, because a clock, a scheduler or a launch would show in it.

    Args:
        calls: by name; what is called was warmed up as far as it needs more than that.
        device: whose work is waited for.
        rounds: at least 1.
        least_ms: of a turn, in milliseconds.

    Raises:
        ValueError: `rounds` is less than 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected a whole number of at least 1, got {rounds}")
    repeats = {}
    for name, call in calls.items():
        once = min(elapsed_ms(call, device) for _ in range(2))
        repeats[name] = max(1, min(MOST_CALLS, math.ceil(least_ms / max(once, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    with no_collection():
        for turn in range(rounds):
            first = turn % max(1, len(names))
            for name in names[first:] + names[:first]:
                spent = elapsed_ms(_repeated(calls[name], repeats[name]), device)
                times[name].append(spent / repeats[name])
    return times


def _repeated(call: Callable[[], object], count: int) -> Callable[[], None]:
    def work() -> None:
        for _ in range(count):
            call()

    return work


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's garbage collector waits: a collection would be timed with whoever triggers it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def spread(values: Sequence[float]) -> tuple[float, float]:
    """20 % and 80 % quantile, interpolated linearly between the sorted values."""
    if len(values) < 2:
        return values[0], values[0]
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return deciles[1], deciles[7]
