"""BitMask: the packed bits as a value, their canonical form, and which parameter they belong to."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

from granet_kernels import BitMask, attach_mask, attached_mask, bitmask, pack_mask
from granet_kernels.bitmask import detach_mask
from granet_kernels.layout import full_mask, packed_length, storage_order, storage_view

SHAPES = [(), (0,), (1,), (8,), (9,), (128,), (129,), (3, 0, 2), (5, 7), (4, 3, 2, 5), (3, 1, 3, 3)]


def channels_last(tensor):
    return tensor.to(memory_format=torch.channels_last)


LAYOUTS = {
    "contiguous": lambda shape: torch.zeros(shape),
    "transposed": lambda shape: torch.zeros(shape[::-1]).permute(*range(len(shape))[::-1]),
    "rotated": lambda shape: torch.zeros((*shape[1:], *shape[:1])).permute(
        len(shape) - 1, *range(len(shape) - 1)
    ),
}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


@pytest.fixture(params=[s for s in SHAPES if s], ids=str)
def weight(request, layout):
    return layout(request.param)


def random_mask(shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def test_worked_example_in_channels_last():
    """Shape (1, 2, 2, 2): memory order is h, w, c, so bit 1 belongs to channel 1 of the first pixel."""
    weight = channels_last(torch.zeros(1, 2, 2, 2))
    mask = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    mask[0, 1, 0, 0] = True
    mask[0, 0, 1, 1] = True
    in_memory = BitMask.from_bool(mask, like=weight)
    assert in_memory.packed.tolist() == [0b0100_0010, *[0] * 15]
    assert in_memory.canonical().tolist() == [0b0001_1000, *[0] * 15]


def test_bit_i_belongs_to_the_ith_element_in_memory(weight):
    weight = weight.clone(memory_format=torch.preserve_format)
    mask = random_mask(weight.shape)
    storage_view(weight).copy_(torch.arange(weight.numel()))
    packed = BitMask.from_bool(mask, like=weight).packed
    for index, on in zip(weight.flatten().long().tolist(), mask.flatten().tolist(), strict=True):
        assert bool(packed[index >> 3] >> (index & 7) & 1) == on


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 127, 128, 129, 1000])
def test_full_has_zero_bits_behind_the_last_weight(numel):
    mask = BitMask.full(torch.empty(numel))
    assert mask.packed.tolist() == pack_mask(torch.ones(numel, dtype=torch.bool)).tolist()
    assert mask.packed.numel() % 16 == 0
    assert mask.count() == numel


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_full_of_every_shape(shape):
    mask = BitMask.full(torch.empty(shape))
    assert mask.to_bool().shape == shape
    assert mask.to_bool().all()
    assert mask.sparsity() == 0.0


def test_bool_round_trip(weight):
    mask = random_mask(weight.shape)
    packed = BitMask.from_bool(mask, like=weight)
    assert packed.packed.shape == (packed_length(weight.numel()),)
    assert torch.equal(packed.to_bool(), mask)
    assert packed.count() == int(mask.sum())


def test_canonical_does_not_depend_on_the_layout(weight):
    mask = random_mask(weight.shape)
    canonical = BitMask.from_bool(mask, like=weight).canonical()
    assert torch.equal(canonical, pack_mask(mask))
    loaded = BitMask.from_canonical(canonical, weight.shape)
    assert torch.equal(loaded.to_bool(), mask)
    follows = loaded.in_order_of(weight)
    assert follows.order == storage_order(weight)
    assert torch.equal(follows.packed, BitMask.from_bool(mask, like=weight).packed)


def test_canonical_shares_memory_only_where_the_order_is_row_major():
    contiguous = BitMask.full(torch.zeros(4, 3, 2, 2))
    assert contiguous.canonical() is contiguous.packed
    moved = BitMask.full(channels_last(torch.zeros(4, 3, 2, 2)))
    assert moved.canonical() is not moved.packed


@pytest.mark.parametrize("shape", [(4, 1, 3, 3), (4, 3, 1, 1), (1, 1, 1, 1)], ids=str)
def test_layouts_that_are_the_same_in_memory_share_one_order(shape):
    """With one channel or a 1x1 kernel channels_last is contiguous too: nothing must be repacked."""
    plain, moved = torch.zeros(shape), channels_last(torch.zeros(shape))
    mask = random_mask(shape)
    bits_of = [BitMask.from_bool(mask, like=weight).packed for weight in (plain, moved)]
    assert torch.equal(*bits_of)


@pytest.mark.parametrize(
    ("packed", "got"),
    [
        (torch.zeros(32, dtype=torch.uint8), r"uint8 \(32,\)"),
        (torch.zeros(8, dtype=torch.uint8), r"uint8 \(8,\)"),
        (torch.zeros(16, 1, dtype=torch.uint8), r"uint8 \(16, 1\)"),
        (torch.zeros(16), r"float32 \(16,\)"),
        (torch.zeros(16, dtype=torch.int8), r"int8 \(16,\)"),
    ],
    ids=["too-long", "too-short", "2-D", "float", "int8"],
)
def test_from_canonical_refuses_what_is_no_mask_of_the_shape(packed, got):
    expected = rf"expected the mask of \(3, 4\) weights, uint8 \(16,\), got \S*{got}"
    with pytest.raises(ValueError, match=expected):
        BitMask.from_canonical(packed, torch.Size((3, 4)))


@pytest.mark.parametrize("byte", [1, 15], ids=["last-used-byte", "padding"])
def test_from_canonical_refuses_bits_behind_the_last_weight(byte):
    packed = full_mask(12)
    packed[byte] |= 0b1000_0000
    with pytest.raises(ValueError, match="zero bits behind the last of 12 weights"):
        BitMask.from_canonical(packed, torch.Size((3, 4)))


def test_counts_and_sparsity():
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[0, :2] = True
    packed = BitMask.from_bool(mask, like=mask)
    assert packed.count() == 2
    assert packed.sparsity() == 1 - 2 / 25
    assert BitMask.full(torch.empty(0)).sparsity() == 0.0


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda mask: pickle.loads(pickle.dumps(mask))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_equal_and_apart(copied):
    mask = BitMask.from_bool(random_mask((4, 3, 2, 2)), channels_last(torch.zeros(4, 3, 2, 2)))
    twin = copied(mask)
    assert twin.order == mask.order
    assert torch.equal(twin.to_bool(), mask.to_bool())
    twin.packed.zero_()
    assert mask.count() > 0


def test_on_the_meta_device():
    weight = channels_last(torch.empty(4, 3, 2, 2, device="meta"))
    mask = BitMask.full(weight)
    assert mask.to_bool().shape == weight.shape
    assert mask.canonical().is_meta
    loaded = BitMask.from_canonical(mask.canonical(), weight.shape)
    assert loaded.in_order_of(weight).packed.shape == mask.packed.shape


def test_a_mask_is_attached_to_a_parameter_and_not_to_its_copies():
    weight = nn.Parameter(torch.zeros(3, 4))
    packed = full_mask(12)
    attach_mask(weight, packed)
    assert attached_mask(weight) is packed
    assert attached_mask(weight.detach()) is None
    assert attached_mask(copy.deepcopy(weight)) is None
    detach_mask(weight)
    assert attached_mask(weight) is None
    detach_mask(weight)  # a dense parameter stays one


def test_parameters_of_equal_values_have_masks_of_their_own():
    """Found by identity: tensors compare element by element, and parameters may be equal."""
    first, second = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    attach_mask(first, full_mask(4))
    assert attached_mask(second) is None


def test_attaching_keeps_no_parameter_alive():
    gc.collect()
    before = len(bitmask._attachments)
    weight = nn.Parameter(torch.zeros(4))
    attach_mask(weight, full_mask(4))
    assert len(bitmask._attachments) == before + 1
    del weight
    gc.collect()
    assert len(bitmask._attachments) == before
