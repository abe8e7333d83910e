"""The byte accounts against accesses counted one by one; run in an interpreter by ``test_triton.py``."""

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from granet_kernels import pack_mask
from granet_kernels.backends import triton as operators
from granet_kernels.backends.triton import accounts
from granet_kernels.backends.triton.cast import mask_cast_bytes
from granet_kernels.backends.triton.mask import (
    count_active_bytes,
    pack_mask_bytes,
    unpack_mask_bytes,
    zero_inactive_bytes,
)
from granet_kernels.backends.triton.select_accounts import (
    drop_regrow_bytes,
    prune_bytes,
    topk_mask_bytes,
)
from granet_kernels.backends.triton.select_keys import DIGIT_BITS
from granet_kernels.backends.triton.sgd import masked_sgd_bytes
from granet_kernels.layout import full_mask, packed_length

SECTOR = 32
SIZES = (4096, 40, 8, 20480, 1000)
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture(autouse=True, params=["triton"])
def backend(request):
    """Named as in the operators' tests, so that these are chosen with them."""
    return request.param


class Counter:
    """Sectors of the watched tensors, and of all bytes, that each launch reads and writes."""

    def __init__(self, tensors):
        self.ranges = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors]
        self.total, self.launch = 0, (set(), set())

    def next_launch(self):
        self.total += SECTOR * sum(map(len, self.launch))
        self.launch = set(), set()

    def note(self, is_write, pointers, mask):
        addresses = np.asarray(pointers.data)[np.asarray(mask.data, dtype=bool)].astype(np.int64)
        if pointers.dtype.scalar.element_ty.primitive_bitwidth != 8:  # masks, also those in between
            watched = np.zeros(addresses.shape, dtype=bool)
            for begin, end in self.ranges:
                watched |= (begin <= addresses) & (addresses < end)
            addresses = addresses[watched]
        self.launch[is_write].update(np.unique(addresses // SECTOR).tolist())


@pytest.fixture
def counted(monkeypatch):
    """Call a function and count the bytes of its launches."""

    def count(call, *tensors):
        counter = Counter(tensors)
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
        run = InterpretedFunction.run

        def noted_load(builder, pointers, mask, *rest, **more):
            counter.note(False, pointers, mask)
            return load(builder, pointers, mask, *rest, **more)

        def noted_store(builder, pointers, value, mask, *rest, **more):
            counter.note(True, pointers, mask)
            return store(builder, pointers, value, mask, *rest, **more)

        def noted_run(kernel, *args, **kwargs):
            counter.next_launch()
            return run(kernel, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(InterpreterBuilder, "create_masked_load", noted_load)
            patch.setattr(InterpreterBuilder, "create_masked_store", noted_store)
            patch.setattr(InterpretedFunction, "run", noted_run)
            result = call()
        counter.next_launch()
        return counter.total, result

    return count


def masks_of(sparsity, sizes=SIZES):
    return [pack_mask(torch.rand(numel) >= sparsity) for numel in sizes]


def masked(numel, mask, dtype=torch.float32):
    """Distinct magnitudes in random order, so that nothing is tied; +0.0 where not active."""
    values = (torch.randperm(numel) + 1.0).to(dtype)
    operators.zero_inactive_([values], [mask])
    return values


def lists_of(sparsity, dtype=torch.float32):
    masks = masks_of(sparsity)
    weights, momenta = (
        [masked(numel, mask, dtype) for numel, mask in zip(SIZES, masks, strict=True)]
        for _ in range(2)
    )
    return weights, masks, momenta


@pytest.mark.parametrize("sparsity", [0.0, 0.9, 0.98, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_sgd(counted, dtype, sparsity):
    params, masks, momenta = lists_of(sparsity, dtype)
    grads = [torch.ones_like(param) for param in params]
    options = {"lr": 0.1, "dampening": 0.0, "weight_decay": 0.1, "first": False}
    options |= {"nesterov": False, "maximize": False}
    for of_momenta, momentum in ((momenta, 0.9), ([], 0.0)):
        lists = params, grads, of_momenta, masks
        found, _ = counted(
            lambda lists=lists, momentum=momentum: operators.masked_sgd_(
                *lists, momentum=momentum, **options
            ),
            *params,
            *grads,
            *momenta,
        )
        assert found == masked_sgd_bytes(params, of_momenta, masks)
    averages = [
        torch.ones_like(param, dtype=torch.promote_types(dtype, torch.float32)) for param in params
    ]
    options |= {"momentum": 0.9, "averages": averages, "average_decay": 0.9}
    found, _ = counted(
        lambda: operators.masked_sgd_(params, grads, momenta, masks, **options),
        *params,
        *grads,
        *momenta,
        *averages,
    )
    assert found == masked_sgd_bytes(params, momenta, masks, averages)


def test_masked_sgd_by_hand():
    """Groups of 32 bytes: three of a hundred touched, five tensors' traffic, 13 bytes of mask."""
    mask = torch.zeros(packed_length(800), dtype=torch.uint8)
    mask[[0, 1, 50]] = torch.tensor([1, 255, 128], dtype=torch.uint8)
    param = torch.empty(800)
    assert masked_sgd_bytes([param], [param], [mask]) == 5 * 3 * 32 + 128
    # bf16: two groups in a sector, of which 0 and 1 share one.
    half = param.bfloat16()
    assert masked_sgd_bytes([half], [half], [mask]) == 5 * 2 * 32 + 128
    # An average of it has fp32: read and written.
    moved = masked_sgd_bytes([half], [half], [mask], [param])
    assert moved == 5 * 2 * 32 + 2 * 3 * 32 + 128


def test_dense_masked_sgd_moves_what_the_dense_step_does():
    numel = 1 << 15
    param = torch.empty(numel)
    moved = masked_sgd_bytes([param], [param], [full_mask(numel)])
    assert moved == 20 * numel + numel // 8


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_mask_cast_and_grad(counted, source, target, dense):
    numel = 4104
    (mask,) = masks_of(0.9, [numel])
    weight, like = torch.ones(numel, dtype=source), torch.empty(numel, dtype=target)
    flag = torch.tensor(dense)

    def call():
        if dense:
            return operators.mask_grad(weight, like, mask, flag)
        return operators.mask_cast(weight, mask, target)

    # The result cannot be watched beforehand: it is written whole, which the account says in one term.
    found, result = counted(call, weight)
    assert result.dtype == target
    written = accounts.in_sectors(result.nbytes)
    flag_read = SECTOR * dense
    assert found - flag_read == mask_cast_bytes(weight, mask, target, dense=dense) - written


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 1.0])
def test_zero_inactive(counted, dtype, sparsity):
    tensors, masks = [torch.ones(numel, dtype=dtype) for numel in SIZES], masks_of(sparsity)
    found, _ = counted(lambda: operators.zero_inactive_(tensors, masks), *tensors)
    assert found == zero_inactive_bytes(tensors, masks)


@pytest.mark.parametrize("numel", [1, 8, 4099, 8192])
def test_masks(counted, numel):
    bits = torch.rand(numel) < 0.5
    found, packed = counted(lambda: operators.pack_mask(bits))
    assert found == pack_mask_bytes(numel)
    found, _ = counted(lambda: operators.unpack_mask(packed, numel))
    assert found == unpack_mask_bytes(numel)
    found, _ = counted(lambda: operators.count_active([packed]))
    assert found == count_active_bytes([packed])


def unequal(weights):
    """So that nothing is tied among the distinct magnitudes of different tensors."""
    for i, weight in enumerate(weights):
        weight.mul_(1 + i / 7)


@pytest.mark.parametrize("has_momenta", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prune(counted, dtype, has_momenta):
    """Together and each, with weights and momenta that are zeros where active, or not where inactive."""
    weights, masks, momenta = lists_of(0.7, dtype)
    unequal(weights)
    weights[0][::3], momenta[3][::2] = 0.0, -0.0
    weights[3][:999] = 1e-9
    given = momenta if has_momenta else []
    active = operators.count_active(masks).tolist()
    for k in (torch.tensor([sum(active) // 2]), torch.tensor([n // 3 for n in active])):
        copies = [[t.clone() for t in tensors] for tensors in (weights, masks, given)]
        expected = prune_bytes(*copies[:2], k, copies[2])
        found, _ = counted(
            lambda copies=copies, k=k: operators.prune_(*copies[:2], k, copies[2]),
            *copies[0],
            *copies[2],
        )
        assert found == expected


def test_prune_by_hand():
    """A tensor of 128 groups of eight, of which one holds what the first digits do not decide."""
    weight = torch.full((1024,), 4.0)
    weight[:8] = torch.tensor([1.0, 1.0 + 2**-23, 1.0 + 2**-22, 9, 9, 9, 9, 9])
    k = torch.tensor([1024 - 1])
    masks = [full_mask(1024)]
    moved = 2 * 4096 + 2 * 32  # weights read twice in whole, and their group in the last two passes
    moved += 32  # the group written that loses a weight
    moved += 128 * (1 + 1 + 1 + 1)  # the mask read twice and written; undecided written
    moved += 2 * 128 + 2 * 2 * 32 + 32  # undecided read; a sector of mask changed, and of undecided
    if DIGIT_BITS == 12:
        assert prune_bytes([weight], masks, k, []) == moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prune_with_ties(counted, dtype):
    weights, masks, momenta = lists_of(0.7, dtype)
    for weight in weights:
        weight.clamp_(max=3.0)
    k = torch.tensor([int(operators.count_active(masks).sum()) // 2])
    expected = prune_bytes(weights, masks, k, momenta)
    found, _ = counted(lambda: operators.prune_(weights, masks, k, momenta), *weights, *momenta)
    assert found == expected


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_drop_regrow(counted, dtype, share):
    """Where none, some and all of what regrows has just been dropped."""
    weights, masks, momenta = lists_of(0.7, dtype)
    scores = [
        torch.where((weight == 0) | (torch.rand(weight.numel()) < share), torch.randn(()), 0) + 1
        for weight in weights
    ]
    scores = [score * (torch.randperm(score.numel()) + 1) for score in scores]
    p = torch.tensor(0.3, dtype=torch.float64)
    expected = drop_regrow_bytes(weights, masks, scores, p, momenta)
    found, _ = counted(
        lambda: operators.drop_regrow_(weights, masks, scores, p, momenta),
        *weights,
        *momenta,
        *scores,
    )
    assert found == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_topk_mask(counted, dtype):
    scores = [(torch.randperm(numel) - 99.0).to(dtype) for numel in SIZES]
    unequal(scores)
    k = torch.tensor([7000])
    expected = topk_mask_bytes(scores, k)
    found, _ = counted(lambda: operators.topk_mask(scores, k), *scores)
    assert found == expected
