"""What `granet bench` prints and writes."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

import torch

from granet.host import device_name
from granet.throughput.measure import Result
from granet.throughput.steps import Setting
from granet_kernels.ops import backend_for

LEGEND = """\
ms: median of a step (20 % to 80 % quantile); x dense: median over rounds of the ratio within a round
active: parameters that are not masked out; GFLOP/s: of active weights
of peak: that, over the rate of a dense matrix product or convolution, the faster; of roofline: attainable
over measured time, layer by layer (help(granet.throughput.roofline) defines it)"""


def device_line(setting: Setting, result: Result) -> str:
    """What a table was measured on, and what it is measured by."""
    rates, kind = result.rates, setting.device.type
    processor = (
        "" if kind == "cuda" else f", {torch.backends.cpu.get_cpu_capability()}, {_threads()}"
    )
    dtype = str(setting.compute_dtype).removeprefix("torch.")
    return (
        f"{kind}: {device_name(setting.device)}{processor}; layers by {backend_for('masked_conv2d', kind)}; "
        f"{dtype} {digits(rates.flops_per_second / 1e9)} GFLOP/s, memory "
        f"{digits(rates.bytes_per_second / 1e9)} GB/s"
    )


def _threads() -> str:
    count = torch.get_num_threads()
    return "1 thread" if count == 1 else f"{count} threads"


def table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    columns: dict[str, Callable[[Result], str]] = {
        "network": lambda r: r.network,
        "sparsity": lambda r: f"{r.sparsity:g}",
        "images/s": lambda r: digits(r.images_per_second),
        "ms": lambda r: f"{digits(r.median_ms)} ({digits(r.p20_ms)}-{digits(r.p80_ms)})",
        "x dense": lambda r: f"{r.speedup:.2f}",
        "active": lambda r: f"{r.active_weights:,}",
        "GFLOP/s": lambda r: digits(r.flops_per_second / 1e9),
        "of peak": lambda r: f"{r.utilisation:.1%}",
        "of roofline": lambda r: f"{r.roofline_share:.1%}",
    }
    if any(result.peak_bytes is not None for result in results):
        columns["peak MiB"] = lambda r: f"{(r.peak_bytes or 0) / 2**20:,.0f}"
    return list(columns), [[cell(result) for cell in columns.values()] for result in results]


def digits(value: float) -> str:
    """Three significant digits, or all before the point."""
    if value >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def row_of(setting: Setting, result: Result) -> Mapping[str, object]:
    """A row of the CSV: times in milliseconds, rates a second, memory in bytes."""
    return {
        "device": setting.device.type,
        "device_name": device_name(setting.device),
        "threads": torch.get_num_threads(),
        "backend": backend_for("masked_conv2d", setting.device.type),
        "torch": torch.__version__,
        "model": setting.model,
        "input_size": "x".join(map(str, setting.sample_shape)),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "amp_dtype": str(setting.amp_dtype or "").removeprefix("torch."),
        "channels_last": setting.channels_last,
        "torchcompile": setting.torchcompile,
        "distribution": setting.distribution,
        "seed": setting.seed,
        "mode": result.mode,
        "network": result.network,
        "sparsity": result.sparsity,
        "batch_size": result.batch_size,
        "rounds": result.rounds,
        "images_per_second": result.images_per_second,
        "median_ms": result.median_ms,
        "p20_ms": result.p20_ms,
        "p80_ms": result.p80_ms,
        "speedup": result.speedup,
        "parameters": result.parameters,
        "active_weights": result.active_weights,
        "step_flops": result.flops,
        "flops_per_second": result.flops_per_second,
        "peak_flops_per_second": result.rates.flops_per_second,
        "memory_bytes_per_second": result.rates.bytes_per_second,
        "utilisation": result.utilisation,
        "attainable_ms": result.attainable_ms,
        "roofline_share": result.roofline_share,
        "peak_bytes": "" if result.peak_bytes is None else result.peak_bytes,
    }


def write_rows(file: TextIO, setting: Setting, results: Sequence[Result]) -> None:
    """Add rows, below a header in an empty file; what is measured is kept if the rest is interrupted."""
    rows = [row_of(setting, result) for result in results]
    writer = csv.DictWriter(file, list(rows[0]))
    if file.tell() == 0:
        writer.writeheader()
    writer.writerows(rows)
    file.flush()
