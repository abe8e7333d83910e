"""A mask byte and its eight weights, inside kernels.

What a group of eight is read or written for is one predicate for all of them, taken from its byte:
a predicate of their own for each element would split a 16-byte access into four or eight.

A byte is loaded once for its group and then repeated: it reaches the threads of its elements through
shared memory. Loading it for each element took twice the instructions, and conditions that are
computed before repeating may each pass through shared memory on their own.
"""

from __future__ import annotations

import triton.language as tl

from granet_kernels.backends.triton.launch import GROUP, jit


@jit
def elements(group):
    """The elements of each group: (groups,) to (groups, 8)."""
    return group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]


@jit
def repeated(byte):
    """The byte of each element: (groups,) to (groups, 8)."""
    return tl.broadcast_to(byte[:, None], [byte.shape[0], GROUP])


@jit
def is_active(byte):
    """Of each element, from its byte: uint8 (groups, 8) to bool."""
    return (byte >> tl.arange(0, GROUP)[None, :] & 1) != 0
