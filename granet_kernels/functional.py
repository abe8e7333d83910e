"""The public functions, typed, and their ``torch.autograd.Function`` wrappers.

A wrapper brings its arguments into the form that the operator takes and calls it; what is computed,
and where, is the operator's business (:mod:`granet_kernels.ops`). Packed masks are 1-D uint8
tensors of one bit a weight in storage order (:mod:`granet_kernels.layout`). Operators that end in
an underscore write their arguments in place, outside autograd.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import granet_kernels.ops  # noqa: F401 - registers the operators
from granet_kernels.choices import Algorithm
from granet_kernels.layout import aligned, shaped

_ops = torch.ops.granet


def pack_mask(mask: Tensor, *, like: Tensor | None = None) -> Tensor:
    """Pack a bool mask of any shape into bits, uint8 1-D, padded to 16 bytes.

    Args:
        mask: bool, any shape and strides.
        like: pack in the storage order of this tensor (same shape), which is what a mask needs that
            belongs to a channels_last weight. By default in row-major order.

    Raises:
        ValueError: ``mask`` is not bool, or ``like`` has another shape.
    """
    if like is not None and like.shape != mask.shape:
        raise ValueError(
            f"like: expected shape {tuple(mask.shape)} as mask, got {tuple(like.shape)}"
        )
    elements = mask.reshape(-1) if like is None else aligned(mask, like)
    return _ops.pack_mask(elements.contiguous())  # type: ignore[no-any-return]


def unpack_mask(packed: Tensor, shape: Sequence[int], *, like: Tensor | None = None) -> Tensor:
    """The inverse of :func:`pack_mask`: a bool tensor of ``shape``.

    Args:
        packed: uint8 1-D.
        shape: of the mask.
        like: the bits are in the storage order of this tensor; by default in row-major order.

    Raises:
        ValueError: ``packed`` is not the mask of that many elements, or ``like`` has another shape.
    """
    size = torch.Size(shape)
    if like is not None and like.shape != size:
        raise ValueError(
            f"like: expected shape {tuple(size)} as shape says, got {tuple(like.shape)}"
        )
    elements: Tensor = _ops.unpack_mask(packed, size.numel())
    return elements.view(size) if like is None else shaped(elements, like)


def count_active(masks: Sequence[Tensor]) -> Tensor:
    """Active weights of each packed mask: int64 (len(masks),), on the masks' device, without a wait."""
    masks = _tensor_list("masks", masks)
    return _ops.count_active(masks) if masks else torch.zeros(0, dtype=torch.int64)


@torch.no_grad()
def zero_inactive_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set inactive elements to +0.0, whatever they were (NaN and infinity included).

    Args:
        tensors: dense in memory; weights, or optimizer states of a weight's layout.
        masks: one packed mask for each.
    """
    if tensors := _tensor_list("tensors", tensors):
        _ops.zero_inactive_(tensors, _tensor_list("masks", masks))


@torch.no_grad()
def prune_(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    k: int | Sequence[int] | Tensor,
    *,
    momenta: Sequence[Tensor] | None = None,
) -> None:
    """Keep the ``k`` active weights of largest magnitude; zero the others and their momentum.

    Exactly ``k`` stay; where fewer are active, all of them do. Equal magnitudes: the lower (tensor,
    element) index stays. NaN ranks as the largest magnitude.

    Args:
        weights: fp32, bf16, fp16 or fp64, dense in memory, all on one device.
        masks: their packed masks.
        k: how many stay over all tensors together, or a list with a count for each tensor. A tensor
            (int64, of 1 or ``len(weights)`` elements) is not read on the host, so that the call can
            be captured in a CUDA graph and its count changed between replays.
        momenta: one for each weight, of its memory layout.

    Source: the paper's gradual magnitude pruning, section 4.1 and Algorithm 1.
    """
    weights = _tensor_list("weights", weights)
    if weights:
        counts = _counts(k, [weight.numel() for weight in weights], weights[0].device)
        _ops.prune_(weights, _tensor_list("masks", masks), counts, _tensor_list("momenta", momenta))


@torch.no_grad()
def drop_regrow_(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    scores: Sequence[Tensor],
    drop_fraction: float | Tensor,
    *,
    momenta: Sequence[Tensor] | None = None,
) -> None:
    """In each tensor drop the smallest active weights and regrow as many inactive ones (in place).

    Drops ``ceil(drop_fraction * active)`` weights of smallest magnitude and regrows as many by the
    largest ``|score|`` among all that are then inactive, the just-dropped included: those keep
    value and momentum, the others start from zero. Ties and NaN weights as in :func:`prune_`; NaN
    scores rank last.

    Args:
        weights, masks, momenta: as in :func:`prune_`.
        scores: one for each weight, its shape, any strides: the dense gradients, as they are.
        drop_fraction: in [0, 1]. A float64 tensor of one element is not read on the host.

    Source: the paper's zero-cost neuroregeneration, section 4.2 and Algorithm 1.
    """
    weights = _tensor_list("weights", weights)
    if not isinstance(drop_fraction, Tensor):
        if not 0 <= drop_fraction <= 1:
            raise ValueError(f"drop_fraction: expected a number in [0, 1], got {drop_fraction}")
        drop_fraction = torch.tensor(drop_fraction, dtype=torch.float64)
    if weights:
        _ops.drop_regrow_(
            weights,
            _tensor_list("masks", masks),
            _tensor_list("scores", scores),
            drop_fraction,
            _tensor_list("momenta", momenta),
        )


def topk_mask(scores: Sequence[Tensor], k: int | Sequence[int] | Tensor) -> list[Tensor]:
    """1.0 at the ``k`` largest scores, 0.0 elsewhere, with a straight-through gradient.

    Args:
        scores: floating, any layout; ranked by value (pass ``s.abs()`` for magnitudes), NaN last.
        k: over all tensors together, or one count for each, as in :func:`prune_`.

    Returns:
        Masks of the scores' shapes and dtypes. The gradient of a mask is handed to its scores
        unchanged (straight-through estimator, Bengio et al. 2013).
    """
    scores = _tensor_list("scores", scores)
    if not scores:
        return []
    counts = _counts(k, [score.numel() for score in scores], scores[0].device)
    return list(TopkMaskFunction.apply(counts, *scores))


class TopkMaskFunction(torch.autograd.Function):
    """Forward: the selection. Backward: the identity."""

    @staticmethod
    def forward(counts: Tensor, *scores: Tensor) -> tuple[Tensor, ...]:
        rows = [score.contiguous() for score in scores]
        packed = _ops.topk_mask(rows, counts)
        return tuple(
            unpack_mask(mask, score.shape).to(score.dtype)
            for mask, score in zip(packed, rows, strict=True)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *grads)


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
    """
    return MaskCastFunction.apply(  # type: ignore[no-any-return]
        weight, mask, _flag(dense_grad, weight), dtype or weight.dtype
    )


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

    Under autocast it computes in the autocast dtype, as ``F.conv2d`` does.
    """
    input, bias = _autocast(input, weight, bias)
    if input.dim() not in (3, 4):
        raise ValueError(f"input: expected 3 or 4 dimensions, got shape {tuple(input.shape)}")
    batched = input.dim() == 4
    output: Tensor = MaskedConv2dFunction.apply(
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
    """``F.linear`` with the masked weight, (O, I); otherwise as :func:`masked_conv2d`."""
    input, bias = _autocast(input, weight, bias)
    return MaskedLinearFunction.apply(  # type: ignore[no-any-return]
        input, weight, mask, bias, _flag(dense_grad, weight), algorithm
    )


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


def _tensor_list(argument: str, tensors: Sequence[Tensor] | None) -> list[Tensor]:
    """A lone tensor is refused: iterating over it would take its rows for tensors."""
    if tensors is None:
        return []
    if isinstance(tensors, Tensor):
        raise TypeError(
            f"{argument}: expected a sequence of tensors, got one tensor; write [tensor]"
        )
    return list(tensors)


def _counts(k: int | Sequence[int] | Tensor, numels: Sequence[int], device: torch.device) -> Tensor:
    """``k`` as the operator takes it: int64, one element for all tensors together or one for each."""
    if isinstance(k, Tensor):
        return k
    if isinstance(k, Sequence):
        counts, limits = list(k), list(numels)
    elif isinstance(k, Integral):
        counts, limits = [int(k)], [sum(numels)]
    else:
        raise TypeError(f"k: expected an integer, a list of them or an int64 tensor, got {k!r}")
    if len(counts) != len(limits):
        raise ValueError(
            f"k: expected one count, or {len(limits)}, one for each tensor, got {len(counts)}"
        )
    for i, (count, limit) in enumerate(zip(counts, limits, strict=True)):
        if not 0 <= count <= limit:
            name = "k" if isinstance(k, Integral) else f"k[{i}]"
            raise ValueError(f"{name}: expected a count from 0 to {limit}, got {count}")
    return torch.tensor(counts, dtype=torch.int64, device=device)
