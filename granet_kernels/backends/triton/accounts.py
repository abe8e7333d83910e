"""How the bytes are counted that an operator moves: what its time is divided by.

Each operator's account, ``masked_sgd_bytes`` for example, stands beside its kernels and follows
from masks and sizes alone, that of selection from its values too. Memory is fetched and written
back by *sectors* of 32 bytes. A launch is charged for each sector of the operator's tensors and
masks that it reads and for each that it writes, once, and a call for all of its launches. Left out
are tables, histograms and thresholds: some kilobytes, which stay in a cache. Tensors are taken to
begin at multiples of 32 bytes, and an incomplete group of eight at the end of one as a whole
group. Masks are packed; an account waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from granet_kernels.backends.triton.launch import GROUP

SECTOR = 32
FULL = 0xFF


def group_bytes(tensor: Tensor, mask: Tensor) -> Tensor:
    """The bytes of a mask without its padding: one for each group of eight elements."""
    return mask[: -(-tensor.numel() // GROUP.value)]


def in_sectors(size: int) -> int:
    """Bytes of the sectors that so many consecutive bytes take."""
    return -(-size // SECTOR) * SECTOR


def in_groups(moved: Tensor, itemsize: int) -> int:
    """Bytes of the sectors of those groups that are moved, bool (groups,)."""
    size: int = GROUP.value * itemsize
    if size >= SECTOR:
        return int(moved.sum()) * size
    together = SECTOR // size  # groups in a sector
    padding = -moved.numel() % together
    sectors = torch.nn.functional.pad(moved, (0, padding)).view(-1, together).any(1)
    return int(sectors.sum()) * SECTOR
