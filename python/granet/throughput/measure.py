"""Throughput of a network, dense and sparse, in training and in inference.

Networks of one table take turns in one process, dense among them, and the yardsticks that
they are divided by, such as a matrix product and a large copy, take their turns with them
(`stopwatch`, `roofline`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from granet.throughput.roofline import Rates, Work, Yardsticks, attainable_seconds, work_of
from granet.throughput.steps import (
    Mode,
    Setting,
    inference_step,
    make_batch,
    make_network,
    training_step,
)
from granet.throughput.stopwatch import median_ratio, spread, take_turns
from granet_kernels import masked_layers

LEAST_MS = 20.0
"""Of a turn."""
WARM_UP = 2
"""Steps before anything is timed: the first creates gradients, momentum, indices, compiled code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One network in one mode; times are of one step of `batch_size` images."""

    mode: Mode
    network: str
    """dense, masked or compressed."""
    sparsity: float
    batch_size: int
    rounds: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    speedup: float
    """Times as fast as dense: the median over rounds of the ratio within a round."""
    parameters: int
    active_weights: int
    """Of all parameters, those that are not masked out."""
    flops: float
    """Of a step, active weights alone."""
    utilisation: float
    """Share of the arithmetic rate that active weights make use of."""
    attainable_ms: float
    """By the roofline, layer by layer."""
    roofline_share: float
    """Of the attainable time in the measured one."""
    rates: Rates
    """Medians over the rounds."""
    peak_bytes: int | None
    """Of CUDA memory, the batch aside; None on a CPU, where a process has no such count."""

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.median_ms * 1e3

    @property
    def flops_per_second(self) -> float:
        return self.flops / self.median_ms * 1e3


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A sparse network that could not be measured."""

    network: str
    sparsity: float
    reason: str

    def __str__(self) -> str:
        reason = " ".join(self.reason.split())[:200]
        return f"{self.network}, {self.sparsity:g}: left out, {reason}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Subject:
    """A network, warmed up."""

    network: str
    sparsity: float
    step: Callable[[], object]
    parameters: int
    active_weights: int
    work: list[Work]
    peak_bytes: int | None

    @property
    def name(self) -> str:
        return f"{self.network} {self.sparsity}"


def measure(
    setting: Setting, mode: Mode, sparsities: Sequence[float], *, rounds: int
) -> tuple[list[Result], list[Failure]]:
    """The dense network, and the sparse ones at each sparsity.

    Raises:
        ValueError: the dense network cannot be run; `sparsities` or `rounds` are out of range.
        ImportError: the model is of a package that is not installed.
    """
    try:
        batch = make_batch(setting)
        dense = _prepared(setting, mode, "dense", 0.0, batch)
    except RuntimeError as error:
        shape = "x".join(map(str, setting.sample_shape))
        raise ValueError(
            f"model: {setting.model} cannot do {mode} on {setting.batch_size} images of {shape}: {error}"
        ) from error
    subjects, failures = [dense], []
    for network, sparsity in _entries(setting, mode, sparsities):
        try:
            subjects.append(_prepared(setting, mode, network, sparsity, batch))
        except RuntimeError as error:  # what is not implemented, and memory that is not there, too
            reason = f"{type(error).__name__}: {error}"
            failures.append(Failure(network=network, sparsity=sparsity, reason=reason))
    yardsticks = Yardsticks(setting.device, yardstick_dtype(setting))
    calls = {subject.name: subject.step for subject in subjects}
    times = take_turns(calls | yardsticks.calls, setting.device, rounds=rounds, least_ms=LEAST_MS)
    rates = yardsticks.rates(times)
    results = [
        _result(subject, mode, setting.batch_size, times[subject.name], times[dense.name], rates)
        for subject in subjects
    ]
    return results, failures


def yardstick_dtype(setting: Setting) -> torch.dtype:
    """The compute dtype; float32 for float16 on a CPU, whose products may be slower than everything else."""
    is_slow = setting.device.type == "cpu" and setting.compute_dtype is torch.float16
    return torch.float32 if is_slow else setting.compute_dtype


def _entries(
    setting: Setting, mode: Mode, sparsities: Sequence[float]
) -> Iterator[tuple[str, float]]:
    for sparsity in dict.fromkeys(sparsities):
        yield "masked", sparsity
        if mode == "inference" and setting.device.type == "cpu":
            yield "compressed", sparsity


def _result(
    subject: _Subject,
    mode: Mode,
    batch_size: int,
    times: Sequence[float],
    dense_times: Sequence[float],
    rates: Sequence[Rates],
) -> Result:
    low, high = spread(times)
    flops = sum(work.flops for work in subject.work)
    attainable = [attainable_seconds(subject.work, of_round) * 1e3 for of_round in rates]
    at_peak = [flops / of_round.flops_per_second * 1e3 for of_round in rates]
    return Result(
        mode=mode,
        network=subject.network,
        sparsity=subject.sparsity,
        batch_size=batch_size,
        rounds=len(times),
        median_ms=statistics.median(times),
        p20_ms=low,
        p80_ms=high,
        speedup=median_ratio(dense_times, times),
        parameters=subject.parameters,
        active_weights=subject.active_weights,
        flops=flops,
        utilisation=median_ratio(at_peak, times),
        attainable_ms=statistics.median(attainable),
        roofline_share=median_ratio(attainable, times),
        rates=Rates(
            flops_per_second=statistics.median(r.flops_per_second for r in rates),
            bytes_per_second=statistics.median(r.bytes_per_second for r in rates),
        ),
        peak_bytes=subject.peak_bytes,
    )


def _prepared(
    setting: Setting, mode: Mode, network: str, sparsity: float, batch: tuple[Tensor, Tensor]
) -> _Subject:
    """A network, its facts, and a step of it that has run `WARM_UP` times."""
    with _counted_memory(setting.device) as peak:
        model = make_network(setting, network, sparsity)
        parameters = sum(p.numel() for p in model.parameters())
        inactive = sum(
            layer.weight.numel() - layer.bitmask.count() for layer in masked_layers(model).values()
        )
        work = work_of(
            model,
            setting.sample_shape,
            batch_size=setting.batch_size,
            training=mode == "training",
            compute_dtype=setting.compute_dtype,
        )
        make = training_step if mode == "training" else inference_step
        step = make(setting, model, network, batch)
        del model  # the step may have made another of it
        for _ in range(WARM_UP):
            step()
        peak_bytes = peak(step)
    return _Subject(
        network=network,
        sparsity=sparsity,
        step=step,
        parameters=parameters,
        active_weights=parameters - inactive,
        work=work,
        peak_bytes=peak_bytes,
    )


@contextmanager
def _counted_memory(
    device: torch.device,
) -> Iterator[Callable[[Callable[[], object]], int | None]]:
    """Gives the peak of CUDA memory while something runs, above what was there on entering."""
    if device.type != "cuda":
        yield lambda run: None
        return
    before = torch.cuda.memory_allocated(device)

    def peak(run: Callable[[], object]) -> int:
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    yield peak
