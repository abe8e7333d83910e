"""Packing, counting, zeroing, mask_cast and mask_grad, by hand."""

import re

import pytest
import torch

from granet_kernels import count_active, mask_cast, pack_mask, unpack_mask, zero_inactive_
from granet_kernels.layout import full_mask, packed_length, storage_order, storage_view
from granet_kernels.selftest import backends_with
from granet_kernels.selftest.inputs import SIZES
from tests.helpers import HERE, INF, NAN, bits, mask_of

BACKENDS = backends_with("pack_mask")
pytestmark = pytest.mark.filterwarnings("ignore:granet_kernels. cpp has no mask_")


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    from granet_kernels import use_backend

    with use_backend(request.param):
        yield request.param


def test_pack_by_hand():
    packed = pack_mask(mask_of(1, 0, 0, 0, 1, 0, 0, 1, 0, 1))
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [0b1001_0001, 0b0000_0010] + [0] * 14


@pytest.mark.parametrize("numel", [*SIZES, 2047, 2048, 4104])
def test_round_trip(numel):
    mask = torch.rand(numel) < 0.5
    packed = pack_mask(mask)
    assert packed.numel() % 16 == 0
    assert packed.numel() == packed_length(numel) >= numel / 8
    assert torch.equal(unpack_mask(packed, (numel,)), mask)
    assert count_active([packed]).tolist() == [int(mask.sum())]
    assert torch.equal(pack_mask(torch.ones(numel, dtype=torch.bool)), full_mask(numel))


def test_round_trip_is_row_major_whatever_the_strides():
    mask = (torch.rand(5, 4, 3, 3) < 0.5).to(memory_format=torch.channels_last)
    assert torch.equal(pack_mask(mask), pack_mask(mask.contiguous()))
    assert torch.equal(unpack_mask(pack_mask(mask), mask.shape), mask)


def test_like_packs_in_storage_order():
    mask = torch.rand(5, 4, 3, 3) < 0.5
    weight = torch.empty(5, 4, 3, 3).to(memory_format=torch.channels_last)
    packed = pack_mask(mask, like=weight)
    assert torch.equal(packed, pack_mask(mask.permute(0, 2, 3, 1)))
    assert torch.equal(unpack_mask(packed, mask.shape, like=weight), mask)


def test_count_of_nothing():
    assert count_active([]).tolist() == []


def test_zero_inactive_by_hand():
    weight = torch.tensor([1, -2, NAN, INF, 5, -6, 7, 8, -9.0])
    zero_inactive_([weight], [pack_mask(mask_of(1, 0, 0, 0, 1, 0, 0, 1, 0))])
    assert bits(weight) == bits([1, 0, 0, 0, 5, 0, 0, 8, 0.0])


def test_zero_inactive_follows_memory():
    mask = torch.rand(4, 3, 3, 3) < 0.5
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    expected = weight.masked_fill(~mask, 0.0)
    zero_inactive_([weight], [pack_mask(mask, like=weight)])
    assert bits(weight) == bits(expected)


def test_zero_inactive_counts_as_a_change():
    """Autograd's version counter sees writes that a kernel makes through a raw pointer."""
    weight = torch.ones(3)
    before = weight._version
    zero_inactive_([weight], [full_mask(3)])
    assert weight._version > before


def test_mask_cast_by_hand():
    weight = torch.tensor([1.0, -2.0, NAN, 4.0], requires_grad=True)
    cast = mask_cast(weight, pack_mask(mask_of(1, 0, 0, 1)), torch.float16)
    assert cast.dtype == torch.float16
    assert cast.tolist() == [1, 0, 0, 4]
    cast.backward(torch.tensor([1, 2, NAN, 4], dtype=torch.float16))
    assert bits(weight.grad) == bits([1, 0, 0, 4.0])


@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("numel", [1, 8, 2047, 2048, 4099, 4104])
def test_views_into_larger_memory(numel, offset):
    """At any address, and what lies before and behind stays as it is."""
    memory, mask = torch.randn(offset + numel + 9), torch.rand(numel) < 0.5
    weight, packed = memory[offset : offset + numel], pack_mask(mask)
    expected = memory.clone()
    expected[offset : offset + numel].masked_fill_(~mask, 0.0)
    assert bits(mask_cast(weight, packed)) == bits(expected[offset : offset + numel])
    zero_inactive_([weight], [packed])
    assert bits(memory) == bits(expected)
    shifted = torch.cat([packed.new_zeros(offset), packed])[offset:]
    assert count_active([shifted, packed]).tolist() == [int(mask.sum())] * 2


STRIDES = {
    "transposed": lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
    "expanded": lambda t: t[:, :1].expand(t.shape),
    "every other": lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
    "of one number": lambda t: t.flatten()[0].expand(t.shape),
}


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dense", [False, True])
def test_mask_grad_of_a_gradient_with_any_strides(strides, memory_format, dense):
    weight = torch.randn(5, 4, 3, 7).contiguous(memory_format=memory_format)
    mask = torch.rand(5, 4, 3, 7) < 0.4
    grad = STRIDES[strides](torch.randn(5, 4, 3, 7))
    packed = pack_mask(mask, like=weight)
    masked = torch.ops.granet.mask_grad(grad, weight, packed, torch.tensor(dense))
    assert masked.stride() == weight.stride()
    assert bits(masked) == bits(grad if dense else grad.masked_fill(~mask, 0.0))


def test_mask_grad_of_many_dimensions():
    weight, grad = (
        torch.randn(3, 2, 3, 2, 3, 2),
        torch.randn(2, 3, 2, 3, 2, 3).permute(5, 4, 3, 2, 1, 0),
    )
    mask = torch.rand(weight.shape) < 0.4
    masked = torch.ops.granet.mask_grad(grad, weight, pack_mask(mask), torch.tensor(False))
    assert bits(masked) == bits(grad.masked_fill(~mask, 0.0))


def test_mask_cast_gives_the_dense_gradient_when_asked():
    weight = torch.ones(4, requires_grad=True)
    cast = mask_cast(weight, pack_mask(mask_of(1, 0, 0, 1)), dense_grad=torch.tensor(True))
    cast.backward(torch.tensor([1.0, 2, 3, 4]))
    assert weight.grad.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: pack_mask(torch.zeros(3)),
            "mask: expected a contiguous 1-D bool tensor, got float32 (3,)",
        ),
        (
            lambda: unpack_mask(torch.zeros(16, dtype=torch.uint8), (200,)),
            "packed: expected 32 bytes, the mask of 200 elements, got 16",
        ),
        (lambda: unpack_mask(torch.zeros(16), (9,)), "packed: expected a packed mask"),
        (
            lambda: zero_inactive_([torch.ones(9)], [torch.zeros(9, dtype=torch.bool)]),
            "masks[0]: expected uint8 (16,), the packed mask of tensors[0] with 9 elements, got bool (9,)",
        ),
        (
            lambda: zero_inactive_([torch.ones(9), torch.ones(9)], [full_mask(9)]),
            "masks: expected 2 tensors, one for each of tensors, got 1",
        ),
        (
            lambda: zero_inactive_([torch.ones(4, 4)[:, :3]], [full_mask(12)]),
            "tensors[0]: expected a tensor without gaps in memory",
        ),
        (
            lambda: zero_inactive_([torch.ones(9).int()], [full_mask(9)]),
            "tensors[0]: expected a float32",
        ),
        (
            lambda: mask_cast(torch.ones(9), full_mask(9), torch.int8),
            "dtype: expected float32, bfloat16, float16 or float64, got int8",
        ),
        (
            lambda: mask_cast(torch.ones(9), full_mask(9, "meta")),
            f"mask: expected a tensor on {HERE} as weight, got meta",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_a_lone_tensor_is_refused():
    with pytest.raises(TypeError, match=r"masks: expected a sequence of tensors, got one tensor"):
        count_active(full_mask(9))


def test_nothing_is_half_changed():
    first, second = torch.ones(9), torch.ones(9)
    with pytest.raises(ValueError, match=r"masks\[1\]"):
        zero_inactive_([first, second], [torch.zeros(16, dtype=torch.uint8), full_mask(200)])
    assert first.tolist() == [1] * 9


def test_overlapping_tensors_are_refused():
    whole = torch.ones(20)
    masks = [torch.zeros(16, dtype=torch.uint8)] * 2
    with pytest.raises(ValueError, match=r"tensors\[1\]: expected memory of its own"):
        zero_inactive_([whole[:10], whole[5:15]], masks)
    assert whole.tolist() == [1] * 20
    zero_inactive_([whole[:10], whole[10:]], masks)
    assert not whole.any()


def test_storage_order():
    weight = torch.arange(24.0).view(2, 3, 2, 2)
    assert storage_order(weight) == (0, 1, 2, 3)
    nhwc = weight.to(memory_format=torch.channels_last)
    assert storage_order(nhwc) == (0, 2, 3, 1)
    assert storage_view(nhwc).tolist() == weight.permute(0, 2, 3, 1).flatten().tolist()
    # strides of dimensions of size 1 say nothing
    assert storage_order(torch.empty(4, 1, 3).as_strided((4, 1, 3), (3, 1, 1))) == storage_order(
        torch.empty(4, 1, 3)
    )
