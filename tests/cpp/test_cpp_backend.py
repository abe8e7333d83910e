"""The compiled operators themselves, below the argument checks of namespace ``granet``.

A model in numpy says what they compute; the other tests here are about what the public operators
rely on: independence of the number of threads, and refusal of what would leave a tensor's memory.
"""

import numpy as np
import pytest
import torch

from granet_kernels.backends import cpp

SIZES = (0, 1, 7, 8, 9, 31, 33, 127, 128, 129, 1009)
MANY = 3 * 32_768 + 5  # more than one slice for each of two threads
DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.uint8,
    torch.complex64,
)


def random_mask(numel: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(numel, generator=torch.Generator().manual_seed(seed + numel)) < 0.4


def packed_model(mask: torch.Tensor) -> np.ndarray:
    bits = np.packbits(mask.numpy(), bitorder="little")
    return np.pad(bits, (0, -len(bits) % 16))


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy().copy()


@pytest.mark.parametrize("numel", [*SIZES, MANY])
def test_pack_and_unpack(numel):
    mask = random_mask(numel)
    packed = cpp.pack_mask(mask)
    assert packed.dtype == torch.uint8
    np.testing.assert_array_equal(packed.numpy(), packed_model(mask))
    unpacked = cpp.unpack_mask(packed, numel)
    assert unpacked.dtype == torch.bool
    assert torch.equal(unpacked, mask)


def test_pack_takes_every_other_byte_for_true():
    mask = torch.tensor([0, 1, 2, 255, 0, 128, 0, 0, 64], dtype=torch.uint8).view(torch.bool)
    assert cpp.pack_mask(mask).tolist() == [0b0010_1110, 1] + [0] * 14


def test_count_active():
    masks = [random_mask(numel) for numel in (*SIZES, MANY)]
    counts = cpp.count_active([cpp.pack_mask(mask) for mask in masks])
    assert counts.dtype == torch.int64
    assert counts.tolist() == [int(mask.sum()) for mask in masks]
    assert cpp.count_active([]).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_inactive(dtype):
    masks = [random_mask(numel) for numel in (*SIZES, MANY)]
    tensors = [torch.empty(mask.numel(), dtype=dtype) for mask in masks]
    generator = torch.Generator().manual_seed(0)
    for tensor in tensors:  # every bit at random, NaN with payloads among them
        tensor.view(torch.uint8).random_(256, generator=generator)
    expected = [
        as_bytes(tensor) * np.repeat(mask.numpy(), dtype.itemsize)
        for tensor, mask in zip(tensors, masks, strict=True)
    ]
    cpp.zero_inactive_(tensors, [cpp.pack_mask(mask) for mask in masks])
    for tensor, wanted in zip(tensors, expected, strict=True):
        np.testing.assert_array_equal(as_bytes(tensor), wanted)


def test_zero_inactive_goes_by_storage_order():
    weight = torch.arange(1.0, 25.0).reshape(1, 4, 2, 3).to(memory_format=torch.channels_last)
    stored = torch.as_strided(weight, (24,), (1,))
    wanted = stored.clone()
    wanted[1:] = 0
    cpp.zero_inactive_([weight], [cpp.pack_mask(torch.arange(24) == 0)])
    assert torch.equal(stored, wanted)


def test_zero_inactive_takes_a_view_that_starts_anywhere():
    storage = torch.ones(40)
    cpp.zero_inactive_([storage[3:20]], [torch.zeros(16, dtype=torch.uint8)])
    assert storage.tolist() == [1.0] * 3 + [0.0] * 17 + [1.0] * 20


def test_results_do_not_depend_on_threads():
    mask = random_mask(1_000_003)
    weight = torch.randn(mask.numel(), generator=torch.Generator().manual_seed(0))
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        packed = cpp.pack_mask(mask)
        cpp.zero_inactive_([zeroed := weight.clone()], [packed])
        results.append((packed, cpp.unpack_mask(packed, mask.numel()), zeroed))
        assert cpp.count_active([packed]).item() == mask.sum()
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


def uint8(numel: int) -> torch.Tensor:
    return torch.zeros(numel, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cpp.pack_mask(torch.ones(8)), "mask: expected a contiguous bool tensor"),
        (lambda: cpp.pack_mask(torch.ones(8, 8).bool().T[::2]), "mask: expected a contiguous bool"),
        (lambda: cpp.unpack_mask(uint8(1), 9), "packed: expected at least 2 bytes for 9 weights"),
        (lambda: cpp.unpack_mask(uint8(1), -1), "numel: expected a number >= 0, got -1"),
        (lambda: cpp.unpack_mask(torch.zeros(16), 9), "packed: expected a contiguous uint8 tensor"),
        (lambda: cpp.count_active([uint8(1), torch.ones(3)]), r"masks\[1\]: expected a contiguous"),
        (lambda: cpp.zero_inactive_([torch.ones(9)], []), "masks: expected one for each of the 1"),
        (lambda: cpp.zero_inactive_([torch.ones(9)], [uint8(1)]), r"masks\[0\]: expected at least"),
        (lambda: cpp.zero_inactive_([torch.ones(9, 2)[:, 0]], [uint8(16)]), "a dense tensor"),
        (lambda: cpp.zero_inactive_([torch.ones(1).expand(9)], [uint8(16)]), "a dense tensor"),
        (
            lambda: cpp.zero_inactive_([torch.ones(9, dtype=torch.complex128)], [uint8(16)]),
            "elements of 1, 2, 4 or 8 bytes, got 16",
        ),
    ],
)
def test_refuses_what_would_leave_the_tensors_memory(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_nothing_is_written_before_everything_is_checked():
    weight = torch.ones(9)
    with pytest.raises(RuntimeError, match="dense"):
        cpp.zero_inactive_([weight, torch.ones(9, 2)[:, 0]], [uint8(16), uint8(16)])
    assert torch.equal(weight, torch.ones(9))
