"""How a bit mask lies in memory, and which bit belongs to which weight.

A mask holds one bit a weight in a 1-D ``uint8`` tensor. Weight *i*, counted in **storage order**,
is bit ``i & 7`` of byte ``i >> 3``; bits past the last weight are zero, and the buffer is padded to
a multiple of 16 bytes so that kernels may read it in 16-byte words. One byte covers eight fp32
weights, 32 bytes, which is one memory sector of a GPU: a kernel reads the byte and knows whether to
touch the sector at all.

Storage order is the order of the elements in memory. For a contiguous tensor it is row-major order;
for a ``channels_last`` one it is N, H, W, C. Packed masks follow the memory of their weight, so a
kernel walks both with one index.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; the widest load of every backend


def packed_length(numel: int) -> int:
    """Bytes in the mask of ``numel`` weights: ceil(numel / 8), rounded up to 16."""
    return (numel + 8 * ALIGNMENT - 1) // (8 * ALIGNMENT) * ALIGNMENT


def full_mask(numel: int, device: torch.device | str | None = None) -> Tensor:
    """A packed mask, uint8 (packed_length(numel),), with all ``numel`` weights active."""
    packed = torch.zeros(packed_length(numel), dtype=torch.uint8, device=device)
    packed[: numel // 8] = 0xFF
    if numel % 8:
        packed[numel // 8] = (1 << numel % 8) - 1
    return packed


def storage_order(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions from slowest to fastest in memory; those of size 1 keep their place in front."""
    by_stride = sorted(range(tensor.dim()), key=tensor.stride().__getitem__, reverse=True)
    single = [d for d in by_stride if tensor.size(d) == 1]
    return (*sorted(single), *(d for d in by_stride if tensor.size(d) != 1))


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory: contiguous, or a permutation of it."""
    return tensor.is_contiguous() or tensor.permute(storage_order(tensor)).is_contiguous()


def storage_view(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor as a 1-D view in storage order; writing to it writes to them."""
    return tensor.permute(storage_order(tensor)).view(-1)


def aligned(tensor: Tensor, like: Tensor) -> Tensor:
    """The elements of ``tensor``, 1-D, in the storage order of ``like`` (same shape): a view or a copy."""
    return tensor.permute(storage_order(like)).reshape(-1)


def shaped(elements: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`aligned`: 1-D elements in the storage order of ``like``, in its shape."""
    order = storage_order(like)
    sizes = [like.size(d) for d in order]
    return elements.view(sizes).permute(inverse_permutation(order))


def inverse_permutation(order: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes ``order``."""
    return tuple(sorted(range(len(order)), key=lambda d: order[d]))


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape keep their elements in the same order in memory."""
    return a.stride() == b.stride() or storage_order(a) == storage_order(b)


def conv_memory_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """Of a convolution's output: channels_last where the input or the weight unambiguously is."""
    for tensor in (input, weight):
        if tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format
