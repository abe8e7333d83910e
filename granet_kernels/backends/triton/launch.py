"""What all kernels share: how they are compiled and launched, and how arguments reach them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_running: Callable[[], AbstractContextManager[None]] = nullcontext
if triton.knobs.runtime.interpret:
    from granet_kernels.backends.triton.interpreter import right_casts as _running

jit, constexpr_function = triton.jit, triton.constexpr_function

FP_FUSION = False
"""Products and sums are rounded once only where a kernel says ``tl.fma``; the compiler's default varies."""

GROUP = tl.constexpr(8)
"""Weights of a mask byte."""

DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}
INTEGERS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
"""By size in bytes, for kernels that move bits."""


def launch(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
    """Run ``kernel`` on the device of its first tensor; nothing to do for no programs."""
    if programs == 0:  # an empty grid is an error
        return
    first = next(arg for arg in args if isinstance(arg, Tensor))
    with torch.cuda.device_of(first), _running():
        kernel[(programs,)](*args, **meta, enable_fp_fusion=FP_FUSION)


def scalar_argument(value: float | Tensor | None, dtype: torch.dtype, device: torch.device) -> Any:
    """A number for :func:`scalar` in a kernel that computes in ``dtype``: itself, or where it lies.

    A tensor on the device is read by the kernel, one on the host here. A float argument of a kernel
    is fp32, so a number for fp64 arithmetic is written to memory, by a launch that keeps its value.
    """
    if value is None or (isinstance(value, Tensor) and value.device == device):
        return value
    number = float(value)
    if dtype == torch.float64:
        return torch.full((1,), number, dtype=dtype, device=device)
    return number


@constexpr_function
def computed_in(*dtypes):
    """fp32, or fp64 where one of the tensors is fp64."""
    return tl.float64 if tl.float64 in dtypes else tl.float32


@jit
def scalar(argument, DTYPE: tl.constexpr):
    """The number in what :func:`scalar_argument` gave."""
    value = argument
    if value.dtype.is_ptr():
        value = tl.load(value)
    return value.to(DTYPE)


@jit
def converted(x, DTYPE: tl.constexpr):
    """Rounded as torch does: fp64 to 16 bits by way of fp32."""
    if x.dtype == tl.float64 and DTYPE.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(DTYPE)
