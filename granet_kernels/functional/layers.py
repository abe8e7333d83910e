"""Convolution and linear layer with a masked weight, and the masked weight itself."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import granet_kernels.ops  # noqa: F401 - registers the operators
from granet_kernels.choices import Algorithm

_ops = torch.ops.granet


def mask_cast(
    weight: Tensor,
    mask: Tensor,
    dtype: torch.dtype | None = None,
    *,
    dense_grad: Tensor | None = None,
) -> Tensor:
    """The masked weight in a compute dtype, in one pass: what autocast would do, and the mask.

    Args:
        weight: dense in memory.
        mask: its packed mask.
        dtype: of the result, which keeps the weight's layout; by default the weight's own.
        dense_grad: bool tensor of one element; where True, backward does not mask the gradient.

    Raises:
        ValueError: a shape, dtype, device or memory layout that does not fit.
    """
    flag = _flag(dense_grad, weight)
    return _apply(MaskCastFunction, weight, mask, flag, dtype or weight.dtype)


class MaskCastFunction(torch.autograd.Function):
    """Backward: the gradient in the weight's dtype, masked unless the dense one is asked for."""

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, dense_grad: Tensor, dtype: torch.dtype) -> Tensor:
        return _ops.mask_cast(weight, mask, dtype)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, mask, dense_grad, _ = inputs
        ctx.save_for_backward(weight, mask, dense_grad)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (_ops.mask_grad(grad, *ctx.saved_tensors), None, None, None)


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    dense_grad: Tensor | None = None,
    algorithm: Algorithm = "auto",
) -> Tensor:
    """``F.conv2d`` with the masked weight; the weight's gradient is masked too.

    Args:
        input: (N, C, H, W) or (C, H, W).
        weight: (O, C / groups, KH, KW), dense in memory.
        mask: its packed mask.
        bias, stride, padding, dilation, groups: as in ``F.conv2d``; padding in numbers.
        dense_grad: bool tensor of one element, read in backward; where True the gradient of
            inactive weights is computed as well (the growth scores of an update).
        algorithm: "sparse" or "dense"; by default what the backend expects to be faster. A backend
            that has one way only takes that, and so does one whose sparse kernels do not cover the
            dtype or the memory layout.

    Returns:
        (N, O, H_out, W_out) or (O, H_out, W_out), in the dtype that was computed in.

    Raises:
        TypeError: padding in words.
        ValueError: a shape, dtype, device or memory layout that does not fit.

    Under autocast it computes in the autocast dtype, as ``F.conv2d`` does.
    """
    input, bias = _autocast(input, weight, bias)
    if input.dim() not in (3, 4):
        raise ValueError(f"input: expected 3 or 4 dimensions, got shape {tuple(input.shape)}")
    batched = input.dim() == 4
    output: Tensor = _apply(
        MaskedConv2dFunction,
        input if batched else input.unsqueeze(0),
        weight,
        mask,
        bias,
        _flag(dense_grad, weight),
        _pair("stride", stride),
        _pair("padding", padding),
        _pair("dilation", dilation),
        groups,
        algorithm,
    )
    return output if batched else output.squeeze(0)


class MaskedConv2dFunction(torch.autograd.Function):
    """``granet::masked_conv2d`` and its backward."""

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        mask: Tensor,
        bias: Tensor | None,
        dense_grad: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        algorithm: Algorithm,
    ) -> Tensor:
        return _ops.masked_conv2d(  # type: ignore[no-any-return]
            input, weight, mask, bias, stride, padding, dilation, groups, algorithm=algorithm
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, mask, bias, dense_grad, *ctx.geometry, ctx.algorithm = inputs
        ctx.save_for_backward(input, weight, mask, bias, dense_grad)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needs = _needs(ctx)
        gradients = _ops.masked_conv2d_backward(
            grad_output, *ctx.saved_tensors, *ctx.geometry, needs, algorithm=ctx.algorithm
        )
        grad_input, grad_weight, grad_bias = _spread(gradients, needs)
        return (grad_input, grad_weight, None, grad_bias, *[None] * 6)


def masked_linear(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    *,
    dense_grad: Tensor | None = None,
    algorithm: Algorithm = "auto",
) -> Tensor:
    """``F.linear`` with the masked weight; the weight's gradient is masked too.

    Args:
        input: (..., I).
        weight: (O, I), dense in memory.
        mask: its packed mask.
        bias: (O,), or None.
        dense_grad, algorithm: as in :func:`masked_conv2d`.

    Returns:
        (..., O), in the dtype that was computed in, which is autocast's under autocast.

    Raises:
        ValueError: a shape, dtype, device or memory layout that does not fit.
    """
    input, bias = _autocast(input, weight, bias)
    flag = _flag(dense_grad, weight)
    return _apply(MaskedLinearFunction, input, weight, mask, bias, flag, algorithm)


class MaskedLinearFunction(torch.autograd.Function):
    """``granet::masked_linear`` and its backward."""

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        mask: Tensor,
        bias: Tensor | None,
        dense_grad: Tensor,
        algorithm: Algorithm,
    ) -> Tensor:
        return _ops.masked_linear(  # type: ignore[no-any-return]
            input, weight, mask, bias, algorithm=algorithm
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.algorithm = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needs = _needs(ctx)
        gradients = _ops.masked_linear_backward(
            grad_output, *ctx.saved_tensors, needs, algorithm=ctx.algorithm
        )
        grad_input, grad_weight, grad_bias = _spread(gradients, needs)
        return (grad_input, grad_weight, None, grad_bias, None, None)


# autograd binds the arguments of every call to the signature of `forward`; computing it anew took 100 us.
for _forward in (
    MaskCastFunction.forward,
    MaskedConv2dFunction.forward,
    MaskedLinearFunction.forward,
):
    setattr(_forward, "__signature__", inspect.signature(_forward))  # noqa: B010


def _in_one_step(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The function with forward and setup_context as one method, as autograd calls faster.

    Of a layer's 90 us it took 30 off, 80 where other tensors have swept the caches.
    """

    class InOneStep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function.forward(*inputs)
            function.setup_context(ctx, inputs, output)
            return output

        backward = function.backward

    InOneStep.__name__ = function.__name__  # the graph's nodes are named after it
    return InOneStep


_ONE_STEP: dict[type[torch.autograd.Function], type[torch.autograd.Function]] = {
    function: _in_one_step(function)
    for function in (MaskCastFunction, MaskedConv2dFunction, MaskedLinearFunction)
}


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    """``function.apply``, in one step but for compilers and ``torch.func``, which want two."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)  # type: ignore[no-any-return]
    return _ONE_STEP[function].apply(*args)  # type: ignore[no-any-return]


def _needs(ctx: Any) -> list[bool]:
    """Which of the gradients of input, weight and bias are wanted."""
    wanted = ctx.needs_input_grad
    return [wanted[0], wanted[1], wanted[3]]


def _spread(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The operator returns the needed gradients only: put None where none was needed."""
    remaining = iter(gradients)
    return [next(remaining) if needed else None for needed in needs]


def _autocast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The input in the dtype that torch would compute in; the operator casts the weight itself."""
    if (dtype := autocast_dtype(input)) is not None:
        return input.to(dtype), bias
    if input.dtype != weight.dtype:
        raise ValueError(
            f"input: expected {weight.dtype} as weight (or autocast), got {input.dtype}"
        )
    return input, bias


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """What autocast would cast the input of a layer to; None where it does not touch it."""
    device_type = input.device.type
    known = device_type != "meta"  # to torch.autocast
    if known and torch.is_autocast_enabled(device_type) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return None


def _flag(dense_grad: Tensor | None, weight: Tensor) -> Tensor:
    return (
        torch.zeros((), dtype=torch.bool, device=weight.device)
        if dense_grad is None
        else dense_grad
    )


def _pair(argument: str, value: int | Sequence[int]) -> list[int]:
    if isinstance(value, str):
        raise TypeError(
            f"{argument}: expected numbers, got {value!r}; MaskedConv2d takes the words"
        )
    return [value, value] if isinstance(value, int) else list(value)
