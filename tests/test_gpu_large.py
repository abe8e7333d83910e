"""The backends on tensors of more than 2^31 elements."""

import pytest
import torch

from granet_kernels.backends import reference
from granet_kernels.layout import full_mask, packed_length
from tests.gpu_states import GPU, OPS, SGD, assert_equal, backend

__all__ = ["backend"]

# One after another: each needs much of the card's memory.
pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.xdist_group("large")]

MANY = 2**31 + 8 * 1000 + 5
EDGE = 4096


def enough_memory(needed):
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory")


def ends(tensor, step=1):
    """The first elements, some around 2^31, the last ones (all beginning at a mask's byte)."""
    last = (tensor.numel() - EDGE // step) // 8 * 8
    middle = 2**31 // step - EDGE // 2
    return [tensor[:EDGE], tensor[middle : middle + EDGE], tensor[last:]]


def ends_of_mask(mask):
    return [reference.pack_mask(bits) for bits in ends(reference_bits(mask))]


def reference_bits(mask):
    """bool, (MANY,), by torch alone and chunk by chunk."""
    bits = torch.empty(8 * mask.numel(), dtype=torch.bool, device=mask.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    for start in range(0, mask.numel(), 1 << 24):
        part = mask[start : start + (1 << 24)]
        bits[8 * start : 8 * start + 8 * part.numel()] = (
            (part[:, None] >> shifts & 1).bool().flatten()
        )
    return bits[:MANY]


def many_bits():
    """A random mask of MANY elements, its padding zero."""
    mask = torch.randint(0, 256, (packed_length(MANY),), dtype=torch.uint8, device=GPU)
    mask[MANY // 8] = 0b10101
    mask[MANY // 8 + 1 :] = 0
    return mask


def test_step_of_more_than_2_to_the_31_elements():
    enough_memory(24 << 30)
    mask = many_bits()
    param, grad, momentum = (
        torch.empty(MANY, dtype=torch.bfloat16, device=GPU).normal_() for _ in range(3)
    )
    expected = [[part.clone() for part in ends(tensor)] for tensor in (param, grad, momentum)]
    masks = ends_of_mask(mask)
    reference.masked_sgd_(*expected, masks, **SGD)
    OPS.masked_sgd_([param], [grad], [momentum], [mask], **SGD)
    assert_equal(ends(param), expected[0])
    assert_equal(ends(momentum), expected[2])


def test_masks_of_more_than_2_to_the_31_elements():
    enough_memory(24 << 30)
    mask = many_bits()
    bits = reference_bits(mask)
    assert int(OPS.count_active([mask])) == int(bits.sum(dtype=torch.int64))
    unpacked = OPS.unpack_mask(mask, MANY)
    assert torch.equal(unpacked, bits)
    del unpacked
    assert torch.equal(OPS.pack_mask(bits), mask)
    weight = torch.ones(MANY, dtype=torch.bfloat16, device=GPU)
    cast = OPS.mask_cast(weight, mask, torch.float16)
    assert_equal(ends(cast), [part.half() for part in ends(bits)])
    del cast
    OPS.zero_inactive_([weight], [mask])
    assert_equal(ends(weight), [part.bfloat16() for part in ends(bits)])
    assert int(weight.count_nonzero()) == int(bits.sum(dtype=torch.int64))


def test_selection_of_more_than_2_to_the_31_elements():
    """Equal magnitudes all through but for a few at the very end: those stay, then the first."""
    enough_memory(24 << 30)
    weight = torch.full((MANY,), 0.5, dtype=torch.bfloat16, device=GPU)
    mask = full_mask(MANY, device=GPU)
    weight[-3:] = 2.0
    k = torch.tensor([1003], device=GPU)
    (chosen,) = OPS.topk_mask([weight], k)
    OPS.prune_([weight], [mask], k, [])
    assert torch.equal(chosen, mask)
    assert int(OPS.count_active([mask])) == 1003
    assert int(weight.count_nonzero()) == 1003
    assert weight[-3:].tolist() == [2.0] * 3
    assert weight[:1000].eq(0.5).all()
    score = torch.zeros(MANY, dtype=torch.bfloat16, device=GPU)
    score[-100:-3] = 1.0
    fraction = torch.tensor(96.5 / 1003, dtype=torch.float64, device=GPU)  # 97 of 1003
    OPS.drop_regrow_([weight], [mask], [score], fraction, [])
    bits = reference_bits(mask)
    assert int(bits.sum(dtype=torch.int64)) == 1003
    assert bits[-100:].all()
    assert bits[: 1000 - 97].all()
