"""Argument checks: they read shapes, strides, dtypes and devices, never data, so fakes run them.

Every error is a ValueError that names the argument, says what was expected, and shows what came.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from granet_kernels.choices import ALGORITHMS
from granet_kernels.layout import is_dense, packed_length, same_layout

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fail(argument: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{argument}: expected {expected}, got {got}")


def describe(tensor: Tensor) -> str:
    """``float32 (3, 4) on cpu``: how errors show a tensor."""
    return f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)} on {tensor.device}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_lengths(**lists: Sequence[Tensor]) -> None:
    """Lists of one entry a tensor: all as long as the first."""
    (first, tensors), *others = lists.items()
    for name, other in others:
        if len(other) != len(tensors):
            fail(name, f"{len(tensors)} tensors, one for each of {first}", len(other))


def check_not_empty(name: str, tensors: Sequence[Tensor]) -> None:
    """The first tensor tells the device; the public functions need no operator for an empty list."""
    if not tensors:
        fail(name, "at least one tensor", "an empty list")


def check_floating(argument: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        fail(argument, "a float32, bfloat16, float16 or float64 tensor", describe(tensor))


def check_written(argument: str, tensor: Tensor) -> None:
    """A tensor that an operator writes in storage order: floating, without gaps or overlaps."""
    check_floating(argument, tensor)
    if not is_dense(tensor):
        strides = f"shape {tuple(tensor.shape)} with strides {tensor.stride()}"
        fail(
            argument,
            "a tensor without gaps in memory (contiguous, or a permutation of it)",
            strides,
        )


def check_device(argument: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    if tensor.device != like.device:
        fail(argument, f"a tensor on {like.device} as {like_name}", tensor.device)


def check_like(argument: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    """Same shape and device as ``like``."""
    check_device(argument, tensor, like, like_name)
    if tensor.shape != like.shape:
        fail(argument, f"the shape of {like_name}, {tuple(like.shape)}", tuple(tensor.shape))


def check_packed(argument: str, mask: Tensor) -> None:
    if mask.dtype != torch.uint8 or mask.dim() != 1 or not mask.is_contiguous():
        fail(argument, "a packed mask: contiguous 1-D uint8", describe(mask))


def check_mask(argument: str, mask: Tensor, weight: Tensor, weight_name: str) -> None:
    """The packed mask of ``weight``."""
    expected = packed_length(weight.numel())
    if mask.dtype != torch.uint8 or mask.shape != (expected,) or not mask.is_contiguous():
        purpose = f"the packed mask of {weight_name} with {weight.numel()} elements"
        fail(argument, f"uint8 ({expected},), {purpose}", describe(mask))
    check_device(argument, mask, weight, weight_name)


def check_masked(name: str, tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Tensors that are written in place, each with its mask, all on one device."""
    check_not_empty(name, tensors)
    check_lengths(**{name: tensors, "masks": masks})
    for i, (tensor, mask) in enumerate(zip(tensors, masks, strict=True)):
        argument = f"{name}[{i}]"
        check_written(argument, tensor)
        check_device(argument, tensor, tensors[0], f"{name}[0]")
        check_mask(f"masks[{i}]", mask, tensor, argument)


def check_momenta(momenta: Sequence[Tensor], weights: Sequence[Tensor], weights_name: str) -> None:
    """None at all, or one for each weight."""
    check_companions("momenta", momenta, weights, weights_name)


def check_companions(
    name: str, tensors: Sequence[Tensor], weights: Sequence[Tensor], weights_name: str
) -> None:
    """None at all, or one for each weight: written in the order of the weight's elements in memory."""
    if not tensors:
        return
    check_lengths(**{weights_name: weights, name: tensors})
    for i, (tensor, weight) in enumerate(zip(tensors, weights, strict=True)):
        check_written(f"{name}[{i}]", tensor)
        check_companion(f"{name}[{i}]", tensor, weight, f"{weights_name}[{i}]")


def check_companion(argument: str, tensor: Tensor, weight: Tensor, weight_name: str) -> None:
    """Shape, device and memory layout are the weight's."""
    check_like(argument, tensor, weight, weight_name)
    if not same_layout(tensor, weight):
        expected = f"the memory layout of {weight_name}, strides {weight.stride()}"
        fail(argument, expected, f"strides {tensor.stride()}")


def check_average(argument: str, average: Tensor, weight: Tensor, weight_name: str) -> None:
    """In the dtype that the weight is computed in, and like the weight otherwise."""
    expected = compute_dtype(weight.dtype)
    if average.dtype != expected:
        reason = f"in which {weight_name}, {dtype_name(weight.dtype)}, is computed"
        fail(argument, f"{dtype_name(expected)}, {reason}", describe(average))
    check_companion(argument, average, weight, weight_name)


def check_average_decay(decay: float) -> None:
    if not isinstance(decay, int | float) or not 0 <= decay <= 1:  # NaN neither
        fail("average_decay", "a number in [0, 1]", decay)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 of bf16 and fp16; other dtypes are their own."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def check_disjoint(reads: Sequence[Tensor] = (), **written: Sequence[Tensor]) -> None:
    """No tensor that is written shares memory with another: the result would depend on the order.

    Args:
        reads: tensors that are only read, which may overlap one another.
        written: lists of tensors that are written, by the name of the argument.
    """
    if _all_apart(itertools.chain(reads, *written.values())):
        return
    spans = [(*_span(tensor), "") for tensor in reads]
    for name, tensors in written.items():
        spans += [(*_span(tensor), f"{name}[{i}]") for i, tensor in enumerate(tensors)]
    end_of_any, end_of_written, last_written = 0, 0, ""
    for start, end, name in sorted(span for span in spans if span[0] != span[1]):
        if start < (end_of_any if name else end_of_written):
            shared = f"memory shared with {(name and last_written) or 'an argument that is read'}"
            fail(name or last_written, "memory of its own, for it is written in place", shared)
        end_of_any = max(end_of_any, end)
        if name:
            end_of_written, last_written = max(end_of_written, end), name


def _all_apart(tensors: Iterable[Tensor]) -> bool:
    """Whether no two tensors share memory, which is usual and soon told."""
    spans = sorted(map(_span, tensors))
    return not any(start < end for (_, end), (start, _) in itertools.pairwise(spans))


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte, and the one behind the last, of the memory that the elements lie in."""
    size = tensor.nbytes
    if size == 0:
        return 0, 0
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + size
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (1 + last) * tensor.element_size()


def check_scalar(argument: str, tensor: Tensor, like: Tensor) -> None:
    """A hyperparameter as a tensor of one element, on the CPU or beside ``like``."""
    if tensor.numel() != 1:
        fail(argument, "a tensor of one element", describe(tensor))
    check_beside(argument, tensor, like)


def check_beside(argument: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device not in (like.device, torch.device("cpu")):
        fail(argument, f"a tensor on cpu or {like.device}", tensor.device)


def check_flag(argument: str, flag: Tensor, weight: Tensor) -> None:
    """A bool that lies beside the weight, so that no kernel waits for the host to read it."""
    check_scalar(argument, flag, weight)
    if flag.dtype != torch.bool:
        fail(argument, "a bool tensor of one element", describe(flag))
    check_device(argument, flag, weight, "weight")


def check_bias(bias: Tensor | None, weight: Tensor) -> None:
    """None, or one floating value for each output of ``weight``."""
    if bias is None:
        return
    check_floating("bias", bias)
    check_device("bias", bias, weight, "weight")
    if bias.dim() != 1 or bias.size(0) != weight.size(0):
        fail("bias", f"shape ({weight.size(0)},)", describe(bias))


def check_grad_output(grad_output: Tensor, size: tuple[int, ...], input: Tensor) -> None:
    """The gradient of an output of that size, in the input's dtype."""
    check_device("grad_output", grad_output, input, "input")
    if tuple(grad_output.shape) != size or grad_output.dtype != input.dtype:
        fail("grad_output", f"{dtype_name(input.dtype)} {size}", describe(grad_output))


def check_algorithm(algorithm: str) -> None:
    """One of the names in :mod:`granet_kernels.choices`."""
    if algorithm not in ALGORITHMS:
        fail("algorithm", f"one of {list(ALGORITHMS)}", repr(algorithm))


def check_needs(needs: Sequence[bool], bias: Tensor | None) -> None:
    """Which gradients of a layer are wanted."""
    if len(needs) != 3 or (needs[2] and bias is None):
        expected = "three flags (input, weight, bias), the last one False without a bias"
        fail("needs", expected, list(needs))


def check_count(argument: str, k: Tensor, tensors: Sequence[Tensor], tensors_name: str) -> None:
    """``k``: int64, one element for the selection over all tensors together, or one for each."""
    if k.dtype != torch.int64 or k.dim() != 1 or k.numel() not in (1, len(tensors)):
        sizes = f"(1,) over all tensors or ({len(tensors)},), one for each of {tensors_name}"
        fail(argument, f"int64 {sizes}", describe(k))
    check_beside(argument, k, tensors[0])
