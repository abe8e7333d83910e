"""Lists of tensors as a table on the device, so that one launch serves all of them.

A program of a kernel takes a *chunk*, consecutive elements of one tensor. ``owners`` says which
tensor has the program's chunk, and a row of ``rows`` holds what is to be known of a tensor:

    its first chunk | its number of elements | its address in each list … | further integers …

A table is written once and used as long as the tensors lie where they lie.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from granet_kernels.backends.triton.launch import jit, launch

KEPT = 64  # tables; a training step uses one to three, and as many again where gradients move

# Columns of a row.
FIRST_CHUNK = tl.constexpr(0)
NUMEL = tl.constexpr(1)
ADDRESSES = tl.constexpr(2)

ALIGNMENT = tl.constexpr(16)  # bytes; the widest access

# Numbers that one launch of _write_kernel carries: 1 of the 4 KiB that arguments may take.
WORDS = 128
# Added to them. Kernels are compiled for the width of each integer of a tuple, for whether 16 divides
# it, and whether it is 1; with this they are all of 64 bits and odd, and one kernel carries any.
MARK = tl.constexpr(1 << 62)
OWNED = tl.constexpr(1024)  # entries of owners that are written at once


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """See the module; made by :meth:`of`."""

    rows: Tensor
    """int64 (tensors, width)."""
    owners: Tensor
    """int32 (chunks,): the row of each chunk's tensor."""
    aligned: bool
    """Whether every address is a multiple of 16 bytes."""

    @property
    def chunks(self) -> int:
        """How many programs a kernel needs."""
        return self.owners.numel()

    @property
    def width(self) -> int:
        """Integers in a row."""
        return self.rows.size(1)

    @classmethod
    def of(
        cls,
        lists: Sequence[Sequence[Tensor]],
        chunk: int,
        columns: Sequence[Sequence[int]] = (),
    ) -> Table:
        """The table of equally long lists of tensors, all on one device.

        Args:
            lists: the first one says how many elements each tensor has.
            chunk: elements in a chunk.
            columns: further integers, one of each column for each tensor.
        """
        device = lists[0][0].device
        sizes = [tensor.numel() for tensor in lists[0]]
        addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in lists]
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # A table of its own, in the graph's memory, that each replay writes just before it is
            # read. So nobody need keep it, and the graph may use its memory again after.
            return _written(device, sizes, addresses, chunk, columns, captured=True)
        # A table is written on the stream of its first use; another stream would not wait for that.
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (device, stream, chunk, *map(tuple, (sizes, *addresses, *columns)))
        table = _tables.pop(key, None)
        if table is None:
            table = _written(device, sizes, addresses, chunk, columns, captured=False)
        _tables[key] = table
        if len(_tables) > KEPT:
            del _tables[next(iter(_tables))]
        return table


_tables: dict[tuple[object, ...], Table] = {}  # the latest used last


def _written(
    device: torch.device,
    sizes: Sequence[int],
    addresses: Sequence[Sequence[int]],
    chunk: int,
    columns: Sequence[Sequence[int]],
    *,
    captured: bool,
) -> Table:
    counts = [triton.cdiv(size, chunk) for size in sizes]
    firsts = [0, *itertools.accumulate(counts)]
    rows = list(zip(firsts[:-1], sizes, *addresses, *columns, strict=True))
    words = list(itertools.chain.from_iterable(rows))
    if captured:  # what a launch is given is kept in the graph, while a copy's source is not
        on_device = torch.empty(len(words), dtype=torch.int64, device=device)
        for start in range(0, len(words), WORDS):
            part = words[start : start + WORDS]
            part += [0] * (WORDS - len(part))
            marked = tuple(2 * word + 1 + MARK.value for word in part)
            launch(_write_kernel, 1, on_device, start, len(words), marked, num_warps=1)
    else:
        on_host = torch.tensor(words, dtype=torch.int64, pin_memory=device.type == "cuda")
        on_device = on_host.to(device, non_blocking=True)
        _load_write_kernel(device)
    owners = torch.empty(firsts[-1], dtype=torch.int32, device=device)
    table_rows = on_device.view(len(rows), -1)
    width = table_rows.size(1)
    launch(_own_kernel, len(rows) if firsts[-1] else 0, owners, table_rows, width, chunk)
    aligned = not any(address % ALIGNMENT.value for address in itertools.chain(*addresses))
    return Table(rows=table_rows, owners=owners, aligned=aligned)


@functools.cache
def _load_write_kernel(device: torch.device) -> None:
    """Launch it once to no effect: a kernel must not be loaded for the first time during a capture."""
    words = torch.empty(1, dtype=torch.int64, device=device)
    launch(_write_kernel, 1, words, 0, 0, (1 + MARK.value,) * WORDS, num_warps=1)


@jit(do_not_specialize=("start", "end"))
def _write_kernel(words, start, end, marked):
    """words[start:end] = the numbers that are marked, as many as there are."""
    for i in tl.static_range(len(marked)):
        tl.store(words + start + i, (marked[i] - MARK) >> 1, mask=start + i < end)


@jit(do_not_specialize=("width", "chunk"))
def _own_kernel(owners, rows, width, chunk):
    """Enter the program's tensor as the owner of each of its chunks."""
    tensor = tl.program_id(0)
    row = rows + tensor * width
    first = tl.load(row + FIRST_CHUNK)
    chunks = (tl.load(row + NUMEL) + chunk - 1) // chunk
    start = 0
    while start < chunks:
        i = start + tl.arange(0, OWNED)
        tl.store(owners + first + i, tl.zeros_like(i) + tensor, mask=i < chunks)
        start += OWNED


@jit
def locate(rows, owners, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Of the program's chunk: its tensor's row, its first element, the tensor's number of elements."""
    chunk = tl.program_id(0)
    row = rows + tl.load(owners + chunk).to(tl.int64) * WIDTH
    return row, (chunk - tl.load(row + FIRST_CHUNK)) * CHUNK, tl.load(row + NUMEL)


@jit
def address(row, LIST: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer to the row's tensor in a list.

    That it is ``ALIGNED`` must be said of the pointer: nothing else tells the compiler, which then reads
    single elements (48 loads of 4 bytes in a step on fp32, instead of 12 of 16).
    """
    pointer = tl.load(row + ADDRESSES + LIST).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, ALIGNMENT)
    return pointer
