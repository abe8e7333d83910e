"""A kernel that reads 64 bytes here and there, for the yardstick of that."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PAIRS = tl.constexpr(256)
NUMBERS = tl.constexpr(16)  # fp32, in two sectors


def read_pairs(numbers: Tensor, wanted: Tensor, sums: Tensor) -> None:
    """sums[i]: of those of the i-th 256 pairs of sectors whose byte in `wanted` is not zero."""
    _read_pairs_kernel[(sums.numel(),)](numbers, wanted, sums)


@triton.jit
def _read_pairs_kernel(numbers, wanted, sums):
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    on = tl.load(wanted + pair) != 0
    element = pair[:, None] * NUMBERS + tl.arange(0, NUMBERS)[None, :]
    mask = tl.broadcast_to(on[:, None], [PAIRS, NUMBERS])
    value = tl.load(numbers + element, mask=mask, other=0)
    tl.store(sums + tl.program_id(0), tl.sum(value))
