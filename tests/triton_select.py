"""What selection must get right in Triton alone; run in an interpreter by ``test_triton.py``."""

import math

import pytest
import torch
import triton.language as tl
from triton import jit

from granet_kernels import pack_mask
from granet_kernels.backends.triton import launch, select, table
from granet_kernels.backends.triton import mask as mask_operators
from granet_kernels.backends.triton.select_kernels import TOGETHER, add_up
from granet_kernels.backends.triton.select_keys import (
    BLOCK,
    CHUNK,
    DIGIT_BITS,
    Ranking,
    digits,
    key_bits,
    key_of,
)
from granet_kernels.layout import full_mask
from tests.helpers import INF, NAN
from tests.test_select import same_as_reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ODD = (0, 1, 7, 8, 9, 31, 33)
EDGES = (BLOCK.value - 1, CHUNK.value, 0, CHUNK.value + BLOCK.value + 1)
ops = torch.ops.granet


@pytest.fixture(autouse=True, params=["triton"])
def backend(request):
    """Named as in the operators' tests, so that these are chosen with them."""
    return request.param


@jit
def _keys_kernel(keys, numbers, BY: tl.constexpr, BLOCK: tl.constexpr):
    element = tl.arange(0, BLOCK)
    tl.store(keys + element, key_of(tl.load(numbers + element), BY).to(tl.int64))


def keys_of(numbers, order, compared_in):
    """Of a power of two of numbers."""
    keys = torch.empty(numbers.numel(), dtype=torch.int64)
    by = Ranking(
        order=order,
        among="all",
        numbers=0,
        dtype=launch.DTYPES[numbers.dtype],
        compared_in=launch.DTYPES[compared_in],
        lists=2,
        aligned=True,
        whole=True,
    )
    launch.launch(_keys_kernel, 1, keys, numbers, BY=by, BLOCK=numbers.numel())
    return keys


def awkward_numbers(dtype):
    """Every number of 16 bits, or some of each exponent; NaN of several patterns."""
    if dtype.itemsize == 2:
        return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    integer = {4: torch.int32, 8: torch.int64}[dtype.itemsize]
    numbers = torch.randint(
        torch.iinfo(integer).min, torch.iinfo(integer).max, (4096,), dtype=integer
    ).view(dtype)
    numbers[::5] = numbers[:820].nan_to_num() * 0  # zeros of both signs
    numbers[1::7] = numbers[:585].to(torch.bfloat16).to(dtype)
    numbers[:6] = torch.tensor([INF, -INF, NAN, -NAN, 0.0, -0.0], dtype=dtype)
    return numbers


RANKS = {  # what sorts the first in front
    "magnitude": lambda x: (0, 0) if math.isnan(x) else (1, -abs(x)),
    "growth": lambda x: (1, 0) if math.isnan(x) else (0, -abs(x)),
    "number": lambda x: (1, 0) if math.isnan(x) else (0, -x),
}


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # NaN, by the interpreter
@pytest.mark.parametrize("order", RANKS)
@pytest.mark.parametrize(
    ("dtype", "compared_in"),
    [
        *[(dtype, dtype) for dtype in FLOATS],
        *[(dtype, torch.float32) for dtype in (torch.bfloat16, torch.float16)],
        *[(dtype, torch.float64) for dtype in (torch.float32, torch.bfloat16, torch.float16)],
    ],
    ids=str,
)
def test_keys_have_the_order_of_the_ranking(order, dtype, compared_in):
    numbers = awkward_numbers(dtype)
    keys = [key % (1 << 64) for key in keys_of(numbers, order, compared_in).tolist()]
    ranks = [RANKS[order](number) for number in numbers.double().tolist()]
    places = range(len(keys))
    assert sorted(places, key=lambda i: -keys[i]) == sorted(places, key=ranks.__getitem__)
    assert max(keys) < (1 << key_bits(order, compared_in)) - 1  # all bits set is above every key


@pytest.mark.parametrize("bits", [15, 16, 31, 32, 63, 64])
def test_digits_are_all_of_a_key(bits):
    for shift, values in digits(bits):
        assert values == 1 << (bits - shift) <= 1 << DIGIT_BITS
        bits = shift
    assert bits == 0


@jit
def _add_up_kernel(tied, tied_before, chunks, VALUES: tl.constexpr):
    add_up(tied, tied_before, chunks, VALUES)


def test_tied_elements_of_more_chunks_than_are_added_at_once():
    """A tensor of some forty million elements has as many."""
    chunks = 2 * TOGETHER.value + 9
    tied = torch.randint(0, 1 << 31, (chunks, 4)).int()
    before = torch.empty(chunks, dtype=torch.int64)
    launch.launch(_add_up_kernel, 1, tied[:, 1:], before, chunks, VALUES=4)
    column = tied[:, 1].long()
    assert torch.equal(before, column.cumsum(0) - column)


@pytest.mark.parametrize("each", [False, True], ids=["together", "each"])
@pytest.mark.parametrize("value", [0.0, -0.5, NAN])
def test_ties_across_blocks_chunks_and_tensors(value, each):
    """All are tied, so that only the position tells who stays."""
    weights = [torch.full((numel,), value) for numel in EDGES]
    masks = [pack_mask(torch.rand(numel) < 0.7) for numel in EDGES]
    wholes = EDGES if each else [sum(EDGES)]
    for counts in ([n // 10 for n in wholes], [6 * n // 10 for n in wholes]):
        same_as_reference("triton", ops.prune_, weights, masks, torch.tensor(counts), [])
        same_as_reference("triton", ops.topk_mask, weights, torch.tensor(counts))
    all_but_one = torch.tensor([max(n - 1, 0) for n in wholes])
    same_as_reference("triton", ops.topk_mask, weights, all_but_one)


def test_ties_in_regrowth_across_blocks_and_chunks():
    weights = [torch.full((numel,), 2.0) for numel in EDGES]
    masks = [pack_mask(torch.rand(numel) < 0.4) for numel in EDGES]
    scores = [torch.randint(-1, 2, (numel,)).float() for numel in EDGES]
    p = torch.tensor(0.4, dtype=torch.float64)
    momenta = [torch.randn(numel) for numel in EDGES]
    same_as_reference("triton", ops.drop_regrow_, weights, masks, scores, p, momenta)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("momentum_dtype", [None, torch.float32], ids=str)
def test_dtypes_sizes_and_addresses_together(momentum_dtype, offset):
    """What kernels are compiled for differs from tensor to tensor, and the ranking goes through all."""
    weights, masks, momenta, scores = [], [], [], []
    for i, numel in enumerate((*ODD, 360, BLOCK.value + 5)):
        dtype = FLOATS[i % 4]
        memory = torch.randn(numel + offset).round(decimals=1).to(dtype)
        weights.append(memory[offset:])
        masks.append(pack_mask(torch.rand(numel) < 0.6))
        momenta.append(torch.randn(numel, dtype=momentum_dtype or dtype))
        scores.append(torch.randn(numel).to(FLOATS[(i + 1) % 4]))
    total = sum(weight.numel() for weight in weights)
    k, p = torch.tensor([total // 4]), torch.tensor(0.3, dtype=torch.float64)
    same_as_reference("triton", ops.prune_, weights, masks, k, momenta)
    same_as_reference("triton", ops.topk_mask, weights, k)
    same_as_reference("triton", ops.drop_regrow_, weights, masks, scores, p, momenta)


@pytest.mark.parametrize("k", [-3, 0, 40, 1 << 40])
def test_counts_out_of_range(k):
    """A count on the device cannot be checked by the host."""
    weights, masks = [torch.randn(33), torch.randn(7)], [full_mask(33), full_mask(7)]
    for counts in (torch.tensor([k]), torch.tensor([k, 3])):
        same_as_reference("triton", ops.prune_, weights, masks, counts, [])
        same_as_reference("triton", ops.topk_mask, weights, counts)


def test_launches(monkeypatch):
    """One for each digit and a last one; dropping and regrowing twice that, and nothing to count before."""
    launched = []
    monkeypatch.setattr(table, "_tables", type(table._tables)())

    def noted(kernel, programs, *args, **meta):
        launched.append(kernel.fn.__name__)
        launch.launch(kernel, programs, *args, **meta)

    for module in (select, table, mask_operators):
        monkeypatch.setattr(module, "launch", noted)
    fraction = torch.tensor(0.5, dtype=torch.float64)
    for dtype in FLOATS:
        masks = [full_mask(40), full_mask(8)]
        weights, scores = (
            [torch.randn(40, dtype=dtype), torch.randn(8, dtype=dtype)] for _ in "ab"
        )
        passes = len(digits(key_bits("magnitude", dtype)))
        if DIGIT_BITS == 12:
            assert passes == {8: 6, 4: 3, 2: 2}[dtype.itemsize]
        ranking = ["_first_digit_kernel", *["_narrow_kernel"] * (passes - 1), "_settle_kernel"]
        for _ in range(2):
            launched.clear()
            select.prune_(weights, masks, torch.tensor([9]), [])
        assert launched == ranking
        for _ in range(2):
            launched.clear()
            select.drop_regrow_(weights, masks, scores, fraction, [])
        assert launched == 2 * ranking


def test_the_host_reads_nothing_and_launches_the_same(monkeypatch):
    """Whatever the values are: so a call can be captured in a CUDA graph."""
    launched = []

    def noted(kernel, programs, *args, **meta):
        launched[-1].append((kernel, programs))
        launch.launch(kernel, programs, *args, **meta)

    def refuse(tensor, *args):
        raise AssertionError("the host waits for the device")

    monkeypatch.setattr(select, "launch", noted)
    for reading in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, reading, refuse)
    for k, p, value in ((0, 0.0, 0.0), (9, 0.5, 1.0), (40, NAN, NAN)):
        launched.append([])
        weights, masks = [torch.full((33,), value), torch.randn(7)], [full_mask(33), full_mask(7)]
        fraction = torch.tensor(p, dtype=torch.float64)
        select.drop_regrow_(weights, masks, [w.clone() for w in weights], fraction, [])
        select.topk_mask(weights, torch.tensor([k]))
        select.prune_(weights, masks, torch.tensor([k]), [])
    assert launched[0] == launched[1] == launched[2]


def test_padding_of_new_masks_is_zero():
    """It is memory that nobody has cleared."""
    for numel in (*ODD, BLOCK.value, BLOCK.value + 1):
        (mask,) = select.topk_mask([torch.ones(numel)], torch.tensor([numel]))
        assert torch.equal(mask, full_mask(numel))
