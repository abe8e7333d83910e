"""What a sparse layer takes by the sum of its parts, each measured in the same run.

    account = the layer without an active weight
            + fetching the values of the active weights, from a weight that is in no cache
            + reading its index, at the memory's rate
            + its products: of a convolution at the kernel's rate where all lies in the first-level cache,
              of a linear layer at its own rate in warm caches

The first part packs inputs or, where they are read in place, fetches them, writes outputs and
gradients, compares the mask and passes through Python. What a measured layer takes beyond its account
are cache misses between the parts; where products overlap with reading and writing, it may take less:
single 1x1 layers 0.63 of it. A layer that reads in place and looks at several pixels has a
kernel of its own, whose loads are masked and cross cache lines, and so a rate of its own.

The inputs of a linear layer's products lie all over its slab, which fills the second-level cache: 256
rows take 0.5 to 0.7 ns for sixteen products forward where the first level gives 0.37, and a line of 64
bytes comes out of the second at 32 bytes a cycle at best, 0.54 ns at 3.7 GHz. So their rate is that of
the layer itself.

A network's training step has an account too: the step without an active weight, and what each of its
layers adds. Packing what is read in place without weights, and the optimizer's part of active ones, are
left out.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cpu.layers import CONTIGUOUS, PACKED_WITHOUT_WEIGHTS, WITHOUT_WEIGHTS, Shape
from bench.cpu.networks import TRAINING_STEP, Network, sparse_convolutions
from bench.cpu.race import Comparison, Race
from bench.cpu.rows import Row
from bench.cpu.shapes import ConvShape, LinearShape
from bench.cpu.targets import DENSE
from granet_kernels import MaskedConv2d, MaskedLinear
from granet_kernels.backends.cpp.conv import conv_shape
from granet_kernels.backends.cpp.index import gather, reads_in_place

PASSES: Mapping[str, int] = {"forward": 1, "forward+backward": 2}  # over the index
BACKWARD_PRODUCTS = 2
"""Of an active weight and a pixel: for the gradient of the input, and for its own."""
FLOAT = 4  # bytes
ENTRY = 8  # bytes that an index has for an active weight: an offset and a rank
PAIRS, LINEAR_PAIRS = 101, 31
SWEPT = 96 << 20  # bytes, more than any cache here


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Of this machine, on so many threads."""

    threads: int
    bytes_a_ms: float
    """Read from memory."""
    products_a_ms: float
    """Of active weights, each a sum and a product, forward."""
    backward_a_ms: float
    """Backward, where what is loaded takes part in two of them."""
    shifted_a_ms: float
    """As `products_a_ms`, in place with masked loads."""
    shifted_backward_a_ms: float
    fetched_ms: float = 0.0
    """What the products of a call include for the values of the active weights."""

    def products_ms(self, measure: str, products: float, *, shifted: bool = False) -> float:
        """So many forward, and twice as many backward."""
        forward = products / (self.shifted_a_ms if shifted else self.products_a_ms)
        if measure == "forward":
            return forward
        backward_a_ms = self.shifted_backward_a_ms if shifted else self.backward_a_ms
        return forward + BACKWARD_PRODUCTS * products / backward_a_ms


def account_ms(
    shape: Shape,
    measure: str,
    sparsity: float,
    without_weights_ms: float,
    rates: Rates,
    *,
    contiguous: bool = True,
) -> float:
    """Milliseconds of a layer at a sparsity, its mask random, in the format it has without weights."""
    weights = math.prod(shape.weight)
    pixels = shape.batch
    if isinstance(shape, ConvShape):
        pixels *= ((shape.side - 1) // shape.stride + 1) ** 2
    active = _active(shape, sparsity)
    # Of a linear layer in what its products add, though warm.
    read = ENTRY * active * PASSES[measure] if isinstance(shape, ConvShape) else 0.0
    fetched = (
        fetching_ms(weights, sparsity, rates.threads) - rates.fetched_ms
    )  # forward; backward has them
    in_place = contiguous and _is_in_place(shape, active)
    shifted = in_place and isinstance(shape, ConvShape) and shape.kernel > 1
    products_ms = rates.products_ms(measure, active * pixels, shifted=shifted)
    return without_weights_ms + fetched + read / rates.bytes_a_ms + products_ms


def _active(shape: Shape, sparsity: float) -> float:
    return math.prod(shape.weight) * (1 - sparsity)


def _is_in_place(shape: Shape, active: float) -> bool:
    """Whether a layer of so many active weights reads its input where it is, in contiguous format."""
    if not isinstance(shape, ConvShape):
        return False
    call = conv_shape(
        torch.empty(shape.input, device="meta"),
        shape.weight,
        *((number, number) for number in (shape.stride, shape.padding, 1)),
        groups=1,
    )
    return reads_in_place(call, int(active), "forward")


def rows_of(
    race: Race, group: str, shape: Shape, measure: str, threads: int, sparsity: float
) -> list[Row]:
    """Dense over the account of ours; no row where one of them failed."""
    idle = WITHOUT_WEIGHTS
    if race.has(PACKED_WITHOUT_WEIGHTS) and not _is_in_place(shape, _active(shape, sparsity)):
        idle = PACKED_WITHOUT_WEIGHTS
    found = race.compare(DENSE, idle, measure)
    if found is None:
        return []
    measured = rates(threads)
    if not isinstance(shape, ConvShape):
        measured = linear_rates(threads, shape, sparsity)
    contiguous = found.ours_variant == CONTIGUOUS
    milliseconds = account_ms(
        shape, measure, sparsity, found.ours_ms, measured, contiguous=contiguous
    )
    return [_row(found, milliseconds, group, str(shape), measure, threads, sparsity)]


def training_rows(
    race: Race, network: Network, threads: int, sparsities: Sequence[float]
) -> list[Row]:
    """Dense over the account of a network's training step, its masks uniform."""
    found = race.compare(DENSE, WITHOUT_WEIGHTS, TRAINING_STEP)
    if found is None:
        return []
    contiguous = found.ours_variant == CONTIGUOUS
    layers = sparse_convolutions(network)

    def added_ms(sparsity: float) -> float:
        call = functools.partial(account_ms, rates=rates(threads), contiguous=contiguous)
        return sum(call(shape, "forward+backward", sparsity, 0.0) for shape in layers)

    return [
        _row(
            found,
            found.ours_ms + added_ms(sparsity),
            "training",
            str(network),
            TRAINING_STEP,
            threads,
            sparsity,
        )
        for sparsity in sparsities
    ]


def _row(
    found: Comparison,
    milliseconds: float,
    group: str,
    case: str,
    measure: str,
    threads: int,
    sparsity: float,
) -> Row:
    return Row(
        group=f"{group}-account",
        case=case,
        measure=measure,
        threads=threads,
        sparsity=sparsity,
        baseline=DENSE,
        baseline_variant=found.baseline_variant,
        baseline_ms=found.baseline_ms,
        ours="account",
        ours_ms=milliseconds,
        speedup=found.baseline_ms / milliseconds,
        rounds=found.rounds,
    )


@functools.cache
def rates(threads: int) -> Rates:
    """Measured once for each number of threads, which must be torch's now."""
    return Rates(
        threads=threads,
        bytes_a_ms=_bytes_a_ms(),
        products_a_ms=_products_a_ms(threads, _forward, PACKED),
        backward_a_ms=BACKWARD_PRODUCTS * _products_a_ms(threads, _backward, PACKED),
        shifted_a_ms=_products_a_ms(threads, _forward, SHIFTED),
        shifted_backward_a_ms=BACKWARD_PRODUCTS * _products_a_ms(threads, _backward, SHIFTED),
    )


@functools.cache
def linear_rates(threads: int, shape: LinearShape, sparsity: float) -> Rates:
    """Likewise, of a layer at a sparsity."""
    more, fewer = (_linear(shape, factor * (1 - sparsity)) for factor in (1.25, 0.75))
    input = torch.randn(shape.input)
    products_a_ms, backward_a_ms = (
        _added_a_ms(more, fewer, input, timed, LINEAR_PAIRS) for timed in (_forward, _backward)
    )
    return dataclasses.replace(
        rates(threads),
        products_a_ms=products_a_ms,
        backward_a_ms=BACKWARD_PRODUCTS * backward_a_ms,
        fetched_ms=fetching_ms(math.prod(shape.weight), sparsity, threads, warm=True),
    )


@functools.cache
def fetching_ms(weights: int, sparsity: float, threads: int, *, warm: bool = False) -> float:
    """Milliseconds to fetch the active ones of so many weights, from one of many in turn.

    A network's weights, and those of the contenders here, are more than the caches hold; one that is
    ``warm`` is always the same.
    """
    torch.set_num_threads(threads)
    count = 1 if warm else max(2, math.ceil(SWEPT / (FLOAT * weights)))
    in_turn = itertools.cycle([torch.ones(weights) for _ in range(count)])
    at = torch.nonzero(torch.rand(weights) >= sparsity).view(-1).int()
    return _median_ms(lambda: gather(next(in_turn), at, rising=True))


def _bytes_a_ms() -> float:
    numbers = torch.ones(32 << 20)
    return numbers.numel() * 4 / _median_ms(numbers.sum)


Layer = MaskedConv2d | MaskedLinear


@dataclass(frozen=True, slots=True)
class _InCache:
    """A convolution whose images fit the first-level cache, with many and with few active weights."""

    channels: tuple[int, int]
    input: tuple[int, int, int, int]
    densities: tuple[float, float]


# With so many active weights it is packed, backward too; with so few read in place, if loads have masks.
PACKED = _InCache((8, 512), (1, 8, 14, 30), (0.75, 0.35))
SHIFTED = _InCache((16, 32), (32, 16, 16, 16), (0.12, 0.03))


def _products_a_ms(threads: int, timed: Callable[[Layer, Tensor], float], which: _InCache) -> float:
    """On one thread."""
    torch.set_num_threads(1)
    many, few = (
        _sparse(MaskedConv2d(*which.channels, 3, padding=1, bias=False), density)
        for density in which.densities
    )
    found = _added_a_ms(many, few, torch.randn(which.input), timed, PAIRS)
    torch.set_num_threads(threads)
    return threads * found


def _added_a_ms(
    more: Layer, fewer: Layer, input: Tensor, timed: Callable[[Layer, Tensor], float], pairs: int
) -> float:
    """Products that one layer has more than the other, a millisecond that it takes longer.

    They take turns: one after the other, the rate of 256 rows came out between 1 and 2.5 times what it
    is now, for outputs take as long as products.
    """
    added = (more.count_active() - fewer.count_active()) * (input.numel() // input.size(1))
    took = [timed(more, input) - timed(fewer, input) for _ in range(pairs)]
    return added / statistics.median(took)


def _forward(layer: Layer, input: Tensor) -> float:
    with torch.inference_mode():
        return _ms(lambda: layer(input))


def _backward(layer: Layer, input: Tensor) -> float:
    layer.weight.grad = None
    output = layer(input.detach().requires_grad_())
    grad_output = torch.ones_like(output)
    return _ms(lambda: output.backward(grad_output))


def _linear(shape: LinearShape, density: float) -> Layer:
    outputs, inputs = shape.weight
    return _sparse(MaskedLinear(inputs, outputs, bias=False), density)


def _sparse(layer: Layer, density: float) -> Layer:
    layer.algorithm = "sparse"
    layer.mask = torch.rand(layer.weight.shape) < density  # type: ignore[assignment]
    return layer


def _median_ms(call: Callable[[], object]) -> float:
    call()
    return statistics.median(_ms(call) for _ in range(9))


def _ms(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3
