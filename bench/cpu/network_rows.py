"""The race of a network's variants, and its rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from bench.cpu import account, networks, peak, verdict
from bench.cpu.networks import MASKS, SPARSIFIED, TRAINING_STEP, Network, Task
from bench.cpu.race import Race
from bench.cpu.rows import Row
from bench.cpu.targets import DENSE, Target

# Where peak memory is measured, in processes of their own: it hardly depends on the sparsity.
PEAK_AT = ("uniform", 0.9)


def measure(
    network: Network,
    task: Task,
    *,
    sparsities: Sequence[float],
    threads: int,
    race: Callable[..., Race],
    seconds: float,
    least: int,
    with_peak: bool,
    targets: Mapping[float, Target],
) -> list[Row]:
    """Rows for uniform and ERK masks; `targets` are for the uniform ones."""
    format_of = functools.partial(networks.faster_format, network, task, threads)
    entered = networks.contenders(network, task, sparsities, format_of)
    if task == TRAINING_STEP:
        memory_format = format_of(SPARSIFIED, max(sparsities), "uniform")
        entered.append(networks.without_weights(network, memory_format))
    done = race(entered, seconds, least)
    rows = []
    for masks in MASKS:
        for sparsity in sparsities:
            for name in networks.our_names(task):
                ours = networks.role(name, sparsity, masks)
                row = verdict.row(
                    done,
                    group=task.partition(" ")[0],
                    case=str(network),
                    measure=task,
                    threads=threads,
                    sparsity=sparsity,
                    masks=masks,
                    baseline=DENSE,
                    ours=ours,
                    label=f"{name}, MaskedSGD" if task == TRAINING_STEP else name,
                    operator="masked_conv2d" if name == SPARSIFIED else "compressed_conv2d",
                    target=targets.get(sparsity) if masks == "uniform" else None,
                    images=network.batch,
                )
                assert row is not None
                if with_peak and (masks, sparsity) == PEAK_AT:
                    memory_format = format_of(name, sparsity, masks)
                    row = _with_peak(row, network, task, memory_format, threads, name)
                rows.append(row)
    if task == TRAINING_STEP:
        rows += account.training_rows(done, network, threads, sparsities)
    return rows


def _with_peak(
    row: Row,
    network: Network,
    task: Task,
    memory_format: str,
    threads: int,
    name: str,
) -> Row:
    dense_format = row.baseline_variant.partition(",")[0] or memory_format
    return replace(
        row,
        baseline_peak_mib=peak.measure(network, task, dense_format, threads),
        ours_peak_mib=peak.measure(network, task, memory_format, threads, name, str(row.sparsity)),
    )
