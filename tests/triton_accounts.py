"""The byte accounts against accesses counted one by one; run in an interpreter by ``test_triton.py``."""

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from granet_kernels import pack_mask
from granet_kernels.backends import triton as operators
from granet_kernels.backends.triton import accounts
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
        assert found == accounts.masked_sgd_bytes(params, of_momenta, masks)


def test_masked_sgd_by_hand():
    """Groups of 32 bytes: three of a hundred touched, five tensors' traffic, 13 bytes of mask."""
    mask = torch.zeros(packed_length(800), dtype=torch.uint8)
    mask[[0, 1, 50]] = torch.tensor([1, 255, 128], dtype=torch.uint8)
    param = torch.empty(800)
    assert accounts.masked_sgd_bytes([param], [param], [mask]) == 5 * 3 * 32 + 128
    # bf16: two groups in a sector, of which 0 and 1 share one.
    half = param.bfloat16()
    assert accounts.masked_sgd_bytes([half], [half], [mask]) == 5 * 2 * 32 + 128


def test_dense_masked_sgd_moves_what_the_dense_step_does():
    numel = 1 << 15
    param = torch.empty(numel)
    moved = accounts.masked_sgd_bytes([param], [param], [full_mask(numel)])
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
    assert (
        found - flag_read == accounts.mask_cast_bytes(weight, mask, target, dense=dense) - written
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 1.0])
def test_zero_inactive(counted, dtype, sparsity):
    tensors, masks = [torch.ones(numel, dtype=dtype) for numel in SIZES], masks_of(sparsity)
    found, _ = counted(lambda: operators.zero_inactive_(tensors, masks), *tensors)
    assert found == accounts.zero_inactive_bytes(tensors, masks)


@pytest.mark.parametrize("numel", [1, 8, 4099, 8192])
def test_masks(counted, numel):
    bits = torch.rand(numel) < 0.5
    found, packed = counted(lambda: operators.pack_mask(bits))
    assert found == accounts.pack_mask_bytes(numel)
    found, _ = counted(lambda: operators.unpack_mask(packed, numel))
    assert found == accounts.unpack_mask_bytes(numel)
    found, _ = counted(lambda: operators.count_active([packed]))
    assert found == accounts.count_active_bytes([packed])


@pytest.mark.parametrize("has_momenta", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_prune(counted, dtype, has_momenta):
    weights, masks, momenta = lists_of(0.7, dtype)
    before = [mask.clone() for mask in masks]
    given = momenta if has_momenta else []
    active = int(operators.count_active(masks).sum())
    # Unequal: among equal magnitudes of different tensors some would be cut.
    for i, weight in enumerate(weights):
        weight.mul_(1 + i / 7)
    k = torch.tensor([active // 2])
    found, _ = counted(lambda: operators.prune_(weights, masks, k, given), *weights, *momenta)
    assert found == accounts.prune_bytes(weights, given, before, masks)


def test_prune_with_ties(counted):
    weights, masks, momenta = lists_of(0.7)
    for weight in weights:
        weight.clamp_(max=1.0)
    before = [mask.clone() for mask in masks]
    k = torch.tensor([int(operators.count_active(masks).sum()) // 2])
    found, _ = counted(lambda: operators.prune_(weights, masks, k, momenta), *weights, *momenta)
    assert found == accounts.prune_bytes(weights, momenta, before, masks, ties=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_drop_regrow(counted, dtype):
    weights, masks, momenta = lists_of(0.7, dtype)
    before = [mask.clone() for mask in masks]
    scores = [
        torch.where(weight == 0, torch.randperm(weight.numel()) + 1, 0).to(dtype)
        for weight in weights
    ]  # nothing that is dropped regrows
    p = torch.tensor(0.3, dtype=torch.float64)
    found, _ = counted(
        lambda: operators.drop_regrow_(weights, masks, scores, p, momenta),
        *weights,
        *momenta,
        *scores,
    )
    assert found == accounts.drop_regrow_bytes(weights, momenta, scores, before, masks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_topk_mask(counted, dtype):
    scores = [
        (torch.randperm(numel) + 1.0).to(dtype) * (1 + i / 7) for i, numel in enumerate(SIZES)
    ]
    k = torch.tensor([7000])
    found, _ = counted(lambda: operators.topk_mask(scores, k), *scores)
    assert found == accounts.topk_mask_bytes(scores)
