"""Copy and read bandwidth: the ceiling that everything else is divided by."""

from __future__ import annotations

import functools
import itertools
import math

import torch

from bench.registry import Case, Setting, Yardstick, register
from bench.resnet50 import weight_shapes
from bench.timing import copies_needed

MIB = 1 << 20
QUICK_BYTES = 1 << 14


def _random_bytes(size: int, setting: Setting) -> torch.Tensor:
    """fp32 noise: a card may clock higher on constant data, which nobody trains on."""
    generator = torch.Generator(setting.device).manual_seed(setting.seed)
    return torch.randn(size // 4, device=setting.device, generator=generator)


def build_copy(size: int, setting: Setting) -> Case:
    """Device-to-device copy of `size` bytes: each is read once and written once."""
    size = QUICK_BYTES if setting.quick else size
    copies = copies_needed(2 * size, setting.cache_bytes)
    pairs = []
    for _ in range(copies):
        source = _random_bytes(size, setting)
        pairs.append((torch.empty_like(source), source))
    turn = itertools.cycle(pairs)

    def run() -> None:
        target, source = next(turn)
        target.copy_(source)

    return Case(
        run=run,
        n_tensors=1,
        n_weights=size // 4,
        model_bytes=2 * size,
        account="read 4 + write 4",
        copies=copies,
    )


def build_read(setting: Setting) -> Case:
    """`torch.sum` over as many fp32 numbers as the network has weights: one read."""
    numel = sum(math.prod(shape) for shape in weight_shapes(setting.size))
    copies = copies_needed(4 * numel, setting.cache_bytes)
    turn = itertools.cycle([_random_bytes(4 * numel, setting) for _ in range(copies)])
    return Case(
        run=lambda: torch.sum(next(turn)),
        n_tensors=1,
        n_weights=numel,
        model_bytes=4 * numel,
        account="read 4",
        copies=copies,
    )


def build_pairs(sparsity: float, setting: Setting) -> Case:
    """Reads of the pairs of sectors, 16 fp32 numbers each, in which a random mask leaves some.

    A GPU reads memory by 64 bytes, and the fewer of them are wanted the less it moves in a second,
    whoever asks. That bounds whatever skips what is inactive.
    """
    from bench.yardsticks.pairs import read_pairs

    numel = sum(math.prod(shape) for shape in weight_shapes(setting.size)) // 4096 * 4096
    generator = torch.Generator(setting.device).manual_seed(setting.seed)
    drawn = torch.rand(numel // 16, device=setting.device, generator=generator)
    wanted = (drawn < 1 - sparsity**16).to(torch.uint8)
    numbers = [
        torch.randn(numel, device=setting.device, generator=generator)
        for _ in range(copies_needed(4 * numel, setting.cache_bytes))
    ]
    sums = torch.empty(numel // 4096, device=setting.device)
    turn = itertools.cycle(numbers)
    count = int(wanted.sum())
    return Case(
        run=lambda: read_pairs(next(turn), wanted, sums),
        n_tensors=1,
        n_weights=numel,
        model_bytes=64 * count + wanted.numel(),
        account="64 a pair + a byte for each",
        copies=len(numbers),
    )


def _copy_row(mebibytes: int) -> Yardstick:
    return Yardstick(
        group="bandwidth",
        name="copy",
        variant=f"{mebibytes}MiB",
        build=functools.partial(build_copy, mebibytes * MIB),
        graph=True,
    )


# Large enough that launch and ramp-up vanish; part of every group's run.
REFERENCE_COPY = _copy_row(512)

register(
    _copy_row(1),
    _copy_row(16),
    _copy_row(128),
    REFERENCE_COPY,
    _copy_row(2048),
    Yardstick(group="bandwidth", name="read", variant="sum", build=build_read, graph=True),
    *(
        Yardstick(
            group="bandwidth",
            name="read",
            variant="pairs",
            build=functools.partial(build_pairs, sparsity),
            sparsity=sparsity,
            graph=True,
            cuda_only=True,
        )
        for sparsity in (0.0, 0.8, 0.9, 0.95, 0.98)
    ),
)
