"""Triton's interpreter, with conversions between fp32 and bf16 that are those of compiled kernels.

Its own truncate to bf16, which makes an infinity of some NaN, and misread bf16 numbers below 2^-126.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast = InterpreterBuilder.cast_impl


def _right_cast(builder: InterpreterBuilder, source: TensorHandle, target_type: Any) -> Any:
    """The interpreter holds bf16 numbers as their bits, in uint16."""
    types = source.dtype.scalar, target_type.scalar
    if types == (tl.float32, tl.bfloat16):
        numbers = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return TensorHandle(numbers.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
    if types == (tl.bfloat16, tl.float32):
        bits = np.asarray(source.data).astype(np.uint32) << np.uint32(16)
        return TensorHandle(bits.view(np.float32), tl.float32)
    return _cast(builder, source, target_type)


@contextmanager
def right_casts() -> Iterator[None]:
    """While our kernels run; other kernels of the process get what they always got."""
    previous = InterpreterBuilder.cast_impl
    InterpreterBuilder.cast_impl = _right_cast
    try:
        yield
    finally:
        InterpreterBuilder.cast_impl = previous
