"""Memory of large tensors, kept from one step to the next."""

from __future__ import annotations

import itertools
import math
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

LEAST_BYTES = 32 << 20
"""Of a tensor whose memory is kept. glibc gives blocks from here on back to the system when they are freed,
unless they fit a free piece of its heap; the system clears their pages when it hands them out again."""

MOST_ROOM = 2
"""How many times as large as a tensor the block may be that it gets: for the last batch of an epoch."""

LONGEST_IDLE = 256
"""Loans after which a block goes that was in none of them; a step of ResNet-50 has some 40, 16 images at
a time."""


class _Block:
    """Memory, and when it was last lent."""

    __slots__ = ("bytes", "lent", "memory")

    def __init__(self, size: int) -> None:
        self.bytes = size
        self.memory = torch.empty(size, dtype=torch.uint8, device="cpu").numpy()
        self.lent = 0


class TensorMemory:
    """Memory for large outputs and gradients, lent again when nobody has the last tensor in it any more.

    A training step frees what it has allocated, and the next allocates it anew. Clearing pages for a
    gradient of 64 MB took 6.6 ms of the 14 ms of a layer of 4096 to 4096 features, 98 % sparse, on 32
    rows; writing a gradient into memory that is there, 2.3.

    Tensors here differ from torch's own in that their storage cannot be resized.
    """

    __slots__ = ("__weakref__", "_clock", "_free")

    def __init__(self) -> None:
        self._clock = itertools.count(1)
        # Whoever lets go of a tensor appends, in any thread and at any time. Who wants memory pops all
        # blocks, one by one, and puts the others back: no lock is held, by a thread that forks or at all.
        self._free: deque[_Block] = deque()

    def like(self, tensor: Tensor) -> Tensor | None:
        """A tensor of another's shape, strides and dtype, its elements arbitrary.

        None where it is small, or the other has gaps between its elements.
        """
        needed = tensor.numel() * tensor.element_size()
        if needed < LEAST_BYTES or not _is_dense(tensor):
            return None
        return self._lend(needed, tensor.dtype).as_strided_(tensor.size(), tensor.stride())

    def empty(
        self, size: Sequence[int], dtype: torch.dtype, memory_format: torch.memory_format
    ) -> Tensor | None:
        """A tensor whose elements are arbitrary; None where it is small."""
        if not is_large(size, dtype):
            return None
        stride = torch.empty(size, device="meta", memory_format=memory_format).stride()
        return self._lend(math.prod(size) * dtype.itemsize, dtype).as_strided_(size, stride)

    def _lend(self, needed: int, dtype: torch.dtype) -> Tensor:
        """Flat. Callers reshape it in place: to a view backward, which records nothing, would let nobody
        write."""
        block = self._block(needed)
        loan = block.memory[:needed]  # a storage refers to it until its last tensor is gone
        weakref.finalize(loan, self._free.append, block).atexit = False
        return torch.frombuffer(loan, dtype=dtype)

    def _block(self, needed: int) -> _Block:
        now = next(self._clock)
        free = [b for b in _popped(self._free) if b.lent >= now - LONGEST_IDLE]
        fitting = [b for b in free if needed <= b.bytes <= MOST_ROOM * needed]
        if fitting:
            # Of the smallest, what has been free for the shortest time may still be in the caches.
            block = min(reversed(fitting), key=lambda b: b.bytes)
            free.remove(block)
        else:
            # Tensors that differ by less will come to share the largest one's.
            too_small = [b for b in free if b.bytes < needed <= MOST_ROOM * b.bytes]
            if too_small:
                free.remove(max(too_small, key=lambda b: b.bytes))
            block = _Block(needed)  # the free ones have gone too, should there be no memory
        self._free.extend(free)
        block.lent = now
        return block


def is_large(size: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether memory of such a tensor is kept."""
    return math.prod(size) * dtype.itemsize >= LEAST_BYTES


_shared: weakref.ref[TensorMemory] | None = None


def shared_memory() -> TensorMemory:
    """That of all layers, which goes with the last of them: whoever uses it keeps it."""
    global _shared
    memory = None if _shared is None else _shared()
    if memory is None:
        memory = TensorMemory()
        _shared = weakref.ref(memory)
    return memory


def _popped(blocks: deque[_Block]) -> list[_Block]:
    popped = []
    while True:
        try:
            popped.append(blocks.popleft())
        except IndexError:
            return popped


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )
