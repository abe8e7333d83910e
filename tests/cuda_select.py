"""What selection must get right in CUDA C++ alone; run on the host by ``test_cuda_simt.py``."""

import pytest
import torch

from granet_kernels import pack_mask
from granet_kernels.backends.cuda import accounts, select
from granet_kernels.layout import full_mask
from tests.helpers import NAN
from tests.test_select import same_as_reference

CHUNK = 16_384
EDGES = (CHUNK - 1, CHUNK, 0, 2 * CHUNK + 9)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ops = torch.ops.granet


@pytest.fixture(autouse=True, params=["cuda"])
def backend(request):
    """Named as in the operators' tests, so that these are chosen with them."""
    return request.param


@pytest.fixture(params=[1, 1 << 40], ids=["sampled", "not sampled"])
def sample_from(request, monkeypatch):
    monkeypatch.setattr(select, "SAMPLE_FROM", request.param)


@pytest.mark.parametrize("each", [False, True], ids=["together", "each"])
@pytest.mark.parametrize("value", [0.0, -0.5, NAN])
def test_ties_across_chunks_and_tensors(sample_from, value, each):
    """All are tied, so that only the position tells who stays."""
    weights = [torch.full((numel,), value) for numel in EDGES]
    masks = [pack_mask(torch.rand(numel) < 0.7) for numel in EDGES]
    wholes = EDGES if each else [sum(EDGES)]
    for counts in ([n // 10 for n in wholes], [6 * n // 10 for n in wholes]):
        same_as_reference("cuda", ops.prune_, weights, masks, torch.tensor(counts), [])
        same_as_reference("cuda", ops.topk_mask, weights, torch.tensor(counts))
    all_but_one = torch.tensor([max(n - 1, 0) for n in wholes])
    same_as_reference("cuda", ops.topk_mask, weights, all_but_one)


def test_ties_in_regrowth(sample_from):
    weights = [torch.full((numel,), 2.0) for numel in EDGES]
    masks = [pack_mask(torch.rand(numel) < 0.4) for numel in EDGES]
    scores = [torch.randint(-1, 2, (numel,)).float() for numel in EDGES]
    p = torch.tensor(0.4, dtype=torch.float64)
    momenta = [torch.randn(numel) for numel in EDGES]
    same_as_reference("cuda", ops.drop_regrow_, weights, masks, scores, p, momenta)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
def test_dtypes_sizes_and_addresses_together(sample_from, offset):
    weights, masks, momenta, scores = [], [], [], []
    for i, numel in enumerate((0, 1, 7, 8, 9, 31, 33, 360, CHUNK + 5)):
        memory = torch.randn(numel + offset).round(decimals=1).to(FLOATS[i % 4])
        weights.append(memory[offset:])
        masks.append(pack_mask(torch.rand(numel) < 0.6))
        momenta.append(torch.randn(numel, dtype=FLOATS[(i + 2) % 4]))
        scores.append(torch.randn(numel).to(FLOATS[(i + 1) % 4]))
    k = torch.tensor([sum(weight.numel() for weight in weights) // 4])
    same_as_reference("cuda", ops.prune_, weights, masks, k, momenta)
    same_as_reference("cuda", ops.topk_mask, weights, k)
    p = torch.tensor(0.3, dtype=torch.float64)
    same_as_reference("cuda", ops.drop_regrow_, weights, masks, scores, p, momenta)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_key_of_a_dtype_alone(sample_from, dtype):
    """Keys of 16-bit numbers are cut short, and fp64 has keys of its own: NaN, infinity, subnormals."""
    if dtype.itemsize == 2:
        numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    else:
        integer = {4: torch.int32, 8: torch.int64}[dtype.itemsize]
        numbers = torch.randint(
            torch.iinfo(integer).min, torch.iinfo(integer).max, (1 << 14,), dtype=integer
        ).view(dtype)
        numbers[::5] = numbers[::5].nan_to_num() * 0  # zeros of both signs
    numbers = numbers[torch.randperm(numbers.numel())]
    for k in (1, 300, numbers.numel() // 2, numbers.numel() - 200):
        same_as_reference("cuda", ops.topk_mask, [numbers], torch.tensor([k]))
        masks = [full_mask(numbers.numel())]
        same_as_reference("cuda", ops.prune_, [numbers], masks, torch.tensor([k]), [])
    masks = [pack_mask(torch.rand(numbers.numel()) < 0.5)]
    p = torch.tensor(0.7, dtype=torch.float64)
    same_as_reference("cuda", ops.drop_regrow_, [numbers], masks, [numbers.flip(0)], p, [])


@pytest.mark.parametrize("k", [-3, 0, 40, 1 << 40])
def test_counts_out_of_range(k):
    """A count on the device cannot be checked by the host."""
    weights, masks = [torch.randn(33), torch.randn(7)], [full_mask(33), full_mask(7)]
    for counts in (torch.tensor([k]), torch.tensor([k, 3])):
        same_as_reference("cuda", ops.prune_, weights, masks, counts, [])
        same_as_reference("cuda", ops.topk_mask, weights, counts)


def test_padding_of_new_masks_is_zero():
    """It is memory that nobody has cleared."""
    for numel in (0, 1, 7, 8, 9, 127, 129, CHUNK, CHUNK + 1):
        (mask,) = select.topk_mask([torch.ones(numel)], torch.tensor([numel]))
        assert torch.equal(mask, full_mask(numel))


def test_a_direct_call_does_not_leave_the_tensors_memory():
    weight, mask, k = torch.ones(9), full_mask(9), torch.tensor([1])
    with pytest.raises(RuntimeError, match=r"masks\[0\]: expected a contiguous uint8 tensor"):
        select.prune_([weight], [mask[:1]], k, [])
    with pytest.raises(RuntimeError, match=r"scores\[0\]: expected a dense tensor"):
        select.topk_mask([torch.ones(9, 2)[:, 0]], k)
    with pytest.raises(RuntimeError, match=r"momenta\[0\]: expected a dense tensor"):
        select.prune_([weight], [mask], k, [torch.ones(8)])
    with pytest.raises(RuntimeError, match="k: expected a contiguous int64 tensor with 1 or 1"):
        select.prune_([weight], [mask], torch.tensor([1, 2]), [])
    assert weight.tolist() == [1] * 9


NUMEL = 1 << 22
MIB = 1 << 20
BITS = NUMEL // 8


def test_a_ranking_reads_numbers_once_after_a_sample(monkeypatch):
    monkeypatch.setattr(accounts, "SAMPLE_FROM", NUMEL)
    scores = [torch.empty(NUMEL)]
    sample, once, bits_written = NUMEL // 256 * 32, 16 * MIB, 2 * BITS
    narrowed, applied = 4 * BITS, 3 * BITS
    wanted = sample + once + bits_written + narrowed + applied
    assert accounts.topk_mask_bytes(scores, undecided=0.0) == wanted
    # Without one the first digit is counted in a pass of its own.
    monkeypatch.setattr(accounts, "SAMPLE_FROM", NUMEL + 1)
    assert accounts.topk_mask_bytes(scores, undecided=0.0) == wanted - sample + once
    # Where everything is undecided it is all read again.
    assert accounts.topk_mask_bytes(scores, undecided=1.0) == wanted - sample + 2 * once


def test_pruning_a_dense_weight_in_bytes_an_element(monkeypatch):
    """The design's "about one read" of 4 bytes, the sample, and the bits in between."""
    monkeypatch.setattr(accounts, "SAMPLE_FROM", NUMEL)
    weights = [torch.empty(NUMEL)]
    mask = full_mask(NUMEL)
    moved = accounts.prune_bytes(weights, [], [mask], [mask])
    assert 5 < moved / NUMEL < 6.5


def test_only_what_takes_part_is_read_and_what_changes_written():
    weights, momenta, bits = [torch.empty(4096)], [torch.empty(4096)], 4096 // 8
    before = full_mask(4096)
    after = pack_mask(torch.arange(4096) >= 16)  # two groups go
    same = accounts.prune_bytes(weights, momenta, [before], [before], undecided=0.0)
    assert (
        accounts.prune_bytes(weights, momenta, [before], [after], undecided=0.0)
        == same + 2 * 2 * 32
    )
    half = pack_mask(torch.arange(4096) < 2048)
    assert accounts.prune_bytes(weights, momenta, [half], [half], undecided=0.0) == same - 2 * (
        4096 * 4 // 2
    )
    assert same == 2 * (4096 * 4 + bits) + 2 * bits + 4 * bits + 4 * bits


def test_drop_regrow_ranks_twice():
    weights, scores, bits = [torch.empty(4096)], [torch.empty(4096)], 4096 // 8
    before = pack_mask(torch.arange(4096) < 2048)
    moved = accounts.drop_regrow_bytes(weights, [], scores, [before], [before])
    ranking = accounts.prune_bytes(weights, [], [before], [before]) - 4 * bits
    assert moved == 2 * ranking + 9 * bits


@pytest.mark.parametrize(
    ("numel", "distance"), [(1 << 16, 16), (1 << 19, 32), (2_359_296, 256), (25_502_912, 256)]
)
def test_samples_are_some_thousands(numel, distance):
    assert accounts._distance(numel) == distance
