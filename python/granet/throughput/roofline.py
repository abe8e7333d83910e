"""How fast a step could be: the roofline of its layers, by rates measured on the spot.

Rates. Of arithmetic: a square matrix product (with TF32 where convolutions have it) or a 3x3
convolution, dense, in the compute dtype, whichever is faster. Of memory: copying a large tensor (each
byte read once and written once) or summing one up (each read once), whichever is faster. They
are what the machine gave in the very round, not what its maker states.

Work. A pass through a convolution or linear layer takes two operations for each active weight and
position, as `granet.flops` has it, and moves its input, its output and its weight once each, from and
to memory: the active values, and one bit a weight where there is a mask. Training takes three such
passes, for the output and for both gradients, and the optimizer, which reads weight, gradient and
momentum of what is active and writes weight and momentum. Nothing else is counted: norms,
activation functions, pooling and additions are taken to be free.

Attainable. A pass takes at least ``max(operations / arithmetic rate, bytes / memory rate)``; passes
come one after another, so a step takes at least their sum. That is the roofline, layer by layer. It
is a model: where a layer's input is still in a cache, a step may be faster than that.

Two shares follow, both in active operations, each the median over rounds. Utilisation is a step's
rate over the arithmetic rate; its share of the roofline is the attainable time over the measured one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from granet.flops import measure, measure_activations
from granet_kernels import masked_layers

MATRIX_SIDE = {"cpu": 512, "cuda": 8192}
IMAGES = {"cpu": (8, 64, 32, 32), "cuda": (64, 256, 56, 56)}
"""That the convolution gets; it gives as many channels as it takes."""
TENSOR_BYTES = {"cpu": 1 << 27, "cuda": 1 << 29}
"""Well above what caches hold."""
OPTIMIZER_MOVES = 5
"""Numbers that SGD with momentum reads and writes for a weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Of a device."""

    flops_per_second: float
    bytes_per_second: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Of one pass through a layer, or of anything that has arithmetic and traffic."""

    flops: float
    bytes: float


def attainable_flops_per_second(work: Work, rates: Rates) -> float:
    """The roofline: the arithmetic rate, or the memory's times the intensity, whichever is less."""
    intensity = work.flops / work.bytes if work.bytes else math.inf
    return min(rates.flops_per_second, intensity * rates.bytes_per_second)


def attainable_seconds(works: Iterable[Work], rates: Rates) -> float:
    """What they take at least, one after another."""
    return math.fsum(
        max(work.flops / rates.flops_per_second, work.bytes / rates.bytes_per_second)
        for work in works
    )


def active_fractions(model: nn.Module) -> dict[str, float]:
    """Share of active weights of each masked layer."""
    return {
        name: layer.bitmask.count() / layer.weight.numel()
        for name, layer in masked_layers(model).items()
    }


def work_of(
    model: nn.Module,
    sample_shape: Sequence[int],
    *,
    batch_size: int,
    training: bool,
    compute_dtype: torch.dtype,
) -> list[Work]:
    """Passes of one step of a model, masked or dense, and its optimizer's update.

    Args:
        model: as it is trained, or for inference with its batch norms as they are.
        sample_shape: of one input, without the batch.
        batch_size: samples in a step.
        training: whether there are gradients and an update.
        compute_dtype: of activations; weights have their own.
    """
    flops = measure(model, sample_shape)
    activations = measure_activations(model, sample_shape)
    active = active_fractions(model)
    modules = dict(model.named_modules())
    works = []
    for name in flops:
        weights = [p for p in modules[name].parameters(recurse=False) if p.dim() > 1]
        moved: float = batch_size * activations[name] * compute_dtype.itemsize
        moved += sum(_weight_bytes(weight, active.get(name)) for weight in weights)
        operations = batch_size * flops[name] * active.get(name, 1.0)
        works += [Work(flops=operations, bytes=moved)] * (3 if training else 1)
    if training:
        works.append(Work(flops=0.0, bytes=OPTIMIZER_MOVES * _parameter_bytes(model, active)))
    return works


def _weight_bytes(weight: Tensor, active: float | None) -> float:
    if active is None:
        return weight.numel() * weight.element_size()
    return weight.numel() * (active * weight.element_size() + 1 / 8)


def _parameter_bytes(model: nn.Module, active: Mapping[str, float]) -> float:
    inactive = math.fsum(
        (1 - active[name]) * layer.weight.numel() * layer.weight.element_size()
        for name, layer in masked_layers(model).items()
    )
    return sum(p.numel() * p.element_size() for p in model.parameters()) - inactive


class Yardsticks:
    """What the rates are measured by: calls to time, and what each of them does."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        kind, generator = device.type, torch.Generator(device).manual_seed(0)

        def noise(*shape: int) -> Tensor:  # a card may clock higher on constant data
            return torch.randn(shape, device=device, generator=generator)

        side, channels = MATRIX_SIDE[kind], IMAGES[kind][1]
        self._left, self._right = noise(side, side).to(dtype), noise(side, side).to(dtype)
        layout = torch.channels_last if kind == "cuda" else torch.contiguous_format
        self._images, self._filters = (
            tensor.to(dtype).contiguous(memory_format=layout)
            for tensor in (noise(*IMAGES[kind]), noise(channels, channels, 3, 3))
        )
        self._source = noise(TENSOR_BYTES[kind] // 4)
        self._target = torch.empty_like(self._source)

    @property
    def calls(self) -> dict[str, Callable[[], object]]:
        """By name."""
        return {
            "matrix product": self._multiply,
            "convolution": lambda: F.conv2d(self._images, self._filters, padding=1),
            "copy": lambda: self._target.copy_(self._source),
            "sum": self._source.sum,
        }

    def rates(self, times_ms: Mapping[str, Sequence[float]]) -> list[Rates]:
        """One a round, from milliseconds a call, by name."""
        side, size = self._left.size(0), 4.0 * self._source.numel()
        amounts = {
            "matrix product": 2.0 * side**3,
            "convolution": 2.0 * self._images.numel() * self._filters[0].numel(),
            "copy": 2 * size,
            "sum": size,
        }
        per_second = {
            name: [amount / time * 1e3 for time in times_ms[name]]
            for name, amount in amounts.items()
        }
        arithmetic = map(max, per_second["matrix product"], per_second["convolution"])
        memory = map(max, per_second["copy"], per_second["sum"])
        return [
            Rates(flops_per_second=flops, bytes_per_second=moved)
            for flops, moved in zip(arithmetic, memory, strict=True)
        ]

    def _multiply(self) -> Tensor:
        matmul = torch.backends.cuda.matmul
        before = matmul.allow_tf32
        matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
        try:
            return self._left @ self._right
        finally:
            matmul.allow_tf32 = before
