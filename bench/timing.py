"""Timing: device events around batches of calls, interleaved, summed up by quantiles.

A pair of events less than about 100 us apart times the host, hence batches; the same small input
read again and again is served by the L2 cache, hence rotation over copies of it; clocks drift
while a card warms up, hence all subjects take turns instead of one after the other.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

# Three times the cache: with less, part of what the last round left behind is still a hit.
CACHE_MULTIPLE = 3
GRAPH_CALLS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How much measuring."""

    rounds: int
    """Timed batches of each subject, at most."""
    min_rounds: int = 3
    """Batches that are timed even when the time is up."""
    warmup: int
    """Untimed runs first, after the one that may compile."""
    batch_ms: float
    """A batch is as many runs as fill this time."""
    max_runs: int = 1000
    """Runs in a batch, at most."""
    until: float = math.inf
    """No new round starts after this time, in seconds since 1970: inputs and compiling take some of it."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_rounds <= self.rounds:
            raise ValueError(
                f"min_rounds: expected 1 to rounds={self.rounds}, got {self.min_rounds}"
            )


QUICK = Effort(rounds=3, warmup=1, batch_ms=0.2, max_runs=5)
FULL = Effort(rounds=25, warmup=3, batch_ms=5.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """One thing to time."""

    label: str
    run: Callable[[], object]
    calls: int = 1
    """How often one `run` does the measured work; times are per call."""
    reset: Callable[[], object] | None = None
    """Restores, untimed, what `run` spends; a batch is then a single run."""
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    """Entered, untimed, around each batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Milliseconds per call over `repeats` batches of `iterations` calls."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int
    iterations: int


def quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    """20 %, 50 % and 80 % quantile, interpolated linearly between the sorted times."""
    if not times:
        raise ValueError("times: expected at least one, got none")
    if len(times) == 1:
        return times[0], times[0], times[0]
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return deciles[1], deciles[4], deciles[7]


def copies_needed(bytes_each: int, cache_bytes: int) -> int:
    """How many copies of a working set exceed the cache `CACHE_MULTIPLE` times (at least one)."""
    if bytes_each <= 0:
        raise ValueError(f"bytes_each: expected a positive number, got {bytes_each}")
    return max(1, math.ceil(CACHE_MULTIPLE * cache_bytes / bytes_each))


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


def graph_replay(run: Callable[[], object], calls: int) -> Callable[[], None]:
    """Captures `calls` calls of `run` into one CUDA graph and returns its replay.

    The replay's time is the device's alone: no Python, no launch from the host.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture wants every lazy initialisation done beforehand
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay


def _batch(subject: Subject, runs: int) -> Callable[[], None]:
    def work() -> None:
        for _ in range(runs):
            subject.run()

    return work


def _timed(subject: Subject, runs: int, device: torch.device) -> float:
    with subject.around():
        if subject.reset is not None:
            subject.reset()
        return elapsed_ms(_batch(subject, runs), device)


def _prepare(subject: Subject, device: torch.device, effort: Effort) -> int:
    """Warms up; returns the runs that make a batch."""
    for _ in range(1 + effort.warmup):
        _timed(subject, 1, device)
    if subject.reset is not None:
        return 1
    once = max(min(_timed(subject, 1, device) for _ in range(2)), 1e-6)
    return max(1, min(effort.max_runs, math.ceil(effort.batch_ms / once)))


def measure(
    subjects: Sequence[Subject], device: torch.device, effort: Effort
) -> dict[str, Sample | Exception]:
    """Times all subjects in turn, round by round, each round starting with the next subject.

    A subject that raises is left out from there on and its exception returned in its place, so
    that one failure costs one row. Labels must differ.
    """
    if len({subject.label for subject in subjects}) != len(subjects):
        raise ValueError(f"subjects: expected distinct labels, got {[s.label for s in subjects]}")
    runs: dict[str, int] = {}
    failures: dict[str, Exception] = {}
    for subject in subjects:
        try:
            runs[subject.label] = _prepare(subject, device, effort)
        except Exception as error:  # whatever a baseline raises is a result
            failures[subject.label] = error
    times: dict[str, list[float]] = {label: [] for label in runs}
    gc.collect()
    gc.disable()  # a collection in the middle of a batch would be timed with it
    try:
        for turn in range(effort.rounds):
            if turn >= effort.min_rounds and time.time() > effort.until:
                break
            alive = [s for s in subjects if s.label in runs and s.label not in failures]
            for subject in alive[turn % max(1, len(alive)) :] + alive[: turn % max(1, len(alive))]:
                count = runs[subject.label]
                try:
                    spent = _timed(subject, count, device)
                except Exception as error:
                    failures[subject.label] = error
                else:
                    times[subject.label].append(spent / (count * subject.calls))
    finally:
        gc.enable()
    outcome: dict[str, Sample | Exception] = {}
    for subject in subjects:
        label = subject.label
        if label in failures:
            outcome[label] = failures[label]
            continue
        low, middle, high = quantiles(times[label])
        outcome[label] = Sample(
            median_ms=middle,
            p20_ms=low,
            p80_ms=high,
            repeats=len(times[label]),
            iterations=runs[label] * subject.calls,
        )
    return outcome
