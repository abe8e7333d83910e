"""Convolution and linear layer with a masked weight, and the masked weight itself."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

import granet_kernels.ops  # noqa: F401 - registers the operators
from granet_kernels.choices import Algorithm
from granet_kernels.ops.define import is_watched, kernel_of, without_dispatcher

_ops = torch.ops.granet
_mask_grad = without_dispatcher("mask_grad")
_masked_conv2d_backward = without_dispatcher("masked_conv2d_backward")
_masked_linear_backward = without_dispatcher("masked_linear_backward")


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
    flag = _no_flag(weight) if dense_grad is None else dense_grad
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
        return (_mask_grad(grad, *ctx.saved_tensors), None, None, None)


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
    if _is_any_autocast_enabled() or input.dtype != weight.dtype:
        input = _autocast(input, weight)
    if input.dim() not in (3, 4):
        raise ValueError(f"input: expected 3 or 4 dimensions, got shape {tuple(input.shape)}")
    batched = input.dim() == 4
    output: Tensor = _apply(
        MaskedConv2dFunction,
        input if batched else input.unsqueeze(0),
        weight,
        mask,
        bias,
        _no_flag(weight) if dense_grad is None else dense_grad,
        stride if isinstance(stride, tuple) else _pair("stride", stride),
        padding if isinstance(padding, tuple) else _pair("padding", padding),
        dilation if isinstance(dilation, tuple) else _pair("dilation", dilation),
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
        *ctx.geometry, ctx.algorithm = inputs[5:]
        ctx.save_for_backward(*inputs[:5])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needs = _needs(ctx)
        gradients = _masked_conv2d_backward(
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
    if _is_any_autocast_enabled() or input.dtype != weight.dtype:
        input = _autocast(input, weight)
    flag = _no_flag(weight) if dense_grad is None else dense_grad
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
        return _no_view(_ops.masked_linear(input, weight, mask, bias, algorithm=algorithm))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.algorithm = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needs = _needs(ctx)
        gradients = _masked_linear_backward(
            grad_output, *ctx.saved_tensors, needs, algorithm=ctx.algorithm
        )
        grad_input, grad_weight, grad_bias = _spread(gradients, needs)
        return (grad_input, grad_weight, None, grad_bias, None, None)


# What follows, and the lack of helpers above, is for the speed of small and of sparse layers: between two
# large tensors every line of Python waits for memory. Forward and backward of a small layer took 110 and
# 155 us, 360 and 320 where other tensors had swept the caches (torch's dense one 32 and 47, 130 and 125).
# Without the dispatcher, and the checks of calls that are like an earlier one, it is 65 and 90, 250 and 230.

# autograd binds the arguments of every call to the signature of `forward`; computing it anew took 100 us.
for _forward in (
    MaskCastFunction.forward,
    MaskedConv2dFunction.forward,
    MaskedLinearFunction.forward,
):
    setattr(_forward, "__signature__", inspect.signature(_forward))  # noqa: B010


def _in_one_step(
    function: type[torch.autograd.Function], compute: Callable[..., Tensor]
) -> type[torch.autograd.Function]:
    """The function with forward and setup_context as one method, as autograd calls faster.

    It calls the operator without the dispatcher, and backward without ``once_differentiable`` where
    nothing records it.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        function.setup_context(ctx, inputs, None)
        return compute(*inputs)

    def backward(ctx: Any, grad_output: Tensor) -> Any:
        backward = function.backward
        if not torch.is_grad_enabled():
            backward = backward.__wrapped__  # type: ignore[attr-defined]
        return backward(ctx, grad_output)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    # The graph's nodes are named as the class was when it was made.
    return types.new_class(
        function.__name__, (torch.autograd.Function,), exec_body=lambda body: body.update(methods)
    )


def _without_flag(operator: str) -> Callable[..., Tensor]:
    """The kernel of a layer, from the inputs of its function: all but the flag, which backward reads."""
    kernel = kernel_of(operator)
    return lambda *inputs: kernel(*inputs[:4], *inputs[5:-1], algorithm=inputs[-1])


_linear_kernel = _without_flag("masked_linear")

_ONE_STEP: dict[type[torch.autograd.Function], type[torch.autograd.Function]] = {
    function: _in_one_step(function, compute)
    for function, compute in (
        (
            MaskCastFunction,
            lambda weight, mask, _, dtype: kernel_of("mask_cast")(weight, mask, dtype),
        ),
        (MaskedConv2dFunction, _without_flag("masked_conv2d")),
        (MaskedLinearFunction, lambda *inputs: _no_view(_linear_kernel(*inputs))),
    )
}


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    """``function.apply``, in one step but for those who watch it, and ``torch.func``, which want two."""
    if is_watched(args):
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


def _autocast(input: Tensor, weight: Tensor) -> Tensor:
    """The input in the dtype that torch would compute in; the operator casts weight and bias itself."""
    if (dtype := autocast_dtype(input)) is not None:
        return input.to(dtype)
    if input.dtype != weight.dtype:
        raise ValueError(
            f"input: expected {weight.dtype} as weight (or autocast), got {input.dtype}"
        )
    return input


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """What autocast would cast the input of a layer to; None where it does not touch it."""
    device_type = input.device.type
    known = device_type != "meta"  # to torch.autocast
    if known and torch.is_autocast_enabled(device_type) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return None


def _no_view(output: Tensor) -> Tensor:
    """The same memory, but nobody's view: ``F.linear`` returns one where there are not two dimensions, and
    autograd lets nobody write to a view that a function returns (``nn.ReLU(inplace=True)``).
    """
    if is_compiling() or not output._is_view():
        return output
    return torch.ops.aten._unsafe_view.default(output, output.shape)  # type: ignore[no-any-return]


def _no_flag(weight: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.bool, device=weight.device)


def _pair(argument: str, value: int | Sequence[int]) -> list[int]:
    if isinstance(value, str):
        raise TypeError(
            f"{argument}: expected numbers, got {value!r}; MaskedConv2d takes the words"
        )
    return [value, value] if isinstance(value, int) else list(value)
