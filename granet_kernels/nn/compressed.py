"""CompressedConv2d and CompressedLinear: layers for inference that hold only non-zeros."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import granet_kernels.ops  # noqa: F401 - registers the operators
from granet_kernels.bitmask import BitMask
from granet_kernels.functional import autocast_dtype, pack_mask
from granet_kernels.layout import full_mask
from granet_kernels.nn.algorithm import HasAlgorithm
from granet_kernels.nn.layers import MaskedConv2d, MaskedLinear
from granet_kernels.ops.conv import output_size

_FORWARD_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class CompressedLayer(HasAlgorithm, nn.Module):
    """What the compressed layers share: non-zeros, where they belong, and how they are saved.

    ``values`` and ``packed_mask`` are immutable: what a backend derives from them it derives once.
    Loading and moving put new tensors in their place.
    """

    weight_shape: tuple[int, ...]
    values: Tensor
    packed_mask: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, mask: Tensor, bias: Tensor | None) -> None:
        """Keep what is active and not zero of a weight; ``mask`` is bool, of its shape."""
        super().__init__()
        self.weight_shape = tuple(weight.shape)
        if weight.is_meta:  # which are zero is not known: room for all
            packed, values = full_mask(weight.numel(), weight.device), weight.flatten()
        else:
            kept = mask & (weight != 0)
            packed, values = pack_mask(kept), weight[kept]  # row-major both, whatever the strides
        self.register_buffer("packed_mask", packed)
        self.values = _constant(values)
        self.register_parameter("bias", None if bias is None else _constant(bias))

    @property
    def mask(self) -> Tensor:
        """Where the non-zeros are: a bool tensor of the weight's shape, computed anew."""
        return BitMask.from_canonical(self.packed_mask, torch.Size(self.weight_shape)).to_bool()

    @property
    def weight(self) -> Tensor:
        """The dense weight, batch norm included, computed anew at each access."""
        if self.values.is_meta:
            return self.values.new_empty(self.weight_shape)
        return self.values.new_zeros(self.weight_shape).masked_scatter_(self.mask, self.values)

    @property
    def sparsity(self) -> float:
        """The fraction of weights that are zero."""
        numel = math.prod(self.weight_shape)
        return 1.0 - self.values.numel() / numel if numel else 0.0

    def count_active(self) -> int:
        """Non-zero weights."""
        return self.values.numel()

    def _input(self, input: Tensor, *others: Any) -> Tensor:
        """The input in the dtype to compute in. There is no gradient, so nothing may ask for one."""
        if torch.is_grad_enabled():
            tensors = (input, self.values, self.bias, *others)
            if any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
                raise RuntimeError(
                    f"{type(self).__name__} is for inference and has no gradient, but an input or a "
                    "parameter requires one: call the model under torch.no_grad(), or train the "
                    "model it was compressed from"
                )
        dtype = autocast_dtype(input)
        return input if dtype is None else input.to(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves and casts: the mask stays uint8, and values become a new tensor.

        Module._apply writes the new data into the old parameter, whose version it leaves as it is:
        what a backend has derived from it would be taken for still good.
        """
        before = self.packed_mask
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.values = nn.Parameter(self.values.detach(), requires_grad=self.values.requires_grad)
        if self.packed_mask.dtype != torch.uint8:  # Module.type() casts every buffer
            self.packed_mask = before.to(self.values.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take as many non-zeros as the file has, together with their mask, or neither."""
        mask_key, values_key = f"{prefix}packed_mask", f"{prefix}values"
        if mask_key in state_dict or values_key in state_dict:
            try:
                self._make_room(state_dict.get(mask_key), state_dict.get(values_key))
            except ValueError as error:
                error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
                return
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def _make_room(self, packed: Tensor | None, values: Tensor | None) -> None:
        """New tensors of the sizes to come; ValueError if the two do not belong together."""
        if packed is None or values is None:
            raise ValueError("expected packed_mask and values, got one without the other")
        mask = BitMask.from_canonical(packed, torch.Size(self.weight_shape))
        if not packed.is_meta and tuple(values.shape) != (mask.count(),):
            raise ValueError(
                f"values: expected {mask.count()} elements, one for each active bit of "
                f"packed_mask, got shape {tuple(values.shape)}"
            )
        self.values = _constant(self.values.new_empty(values.shape))
        self.packed_mask = torch.empty_like(self.packed_mask)


def _constant(tensor: Tensor) -> nn.Parameter:
    """A parameter, so that it is counted, moved, cast and saved like one; a copy without gradient."""
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)


def _copy_hooks(source: nn.Module, target: nn.Module) -> None:
    for name in _FORWARD_HOOKS:
        target.__dict__[name] = source.__dict__[name].copy()


class CompressedConv2d(CompressedLayer):
    """A convolution that holds only non-zeros, with what follows it fused: for inference.

    Computes ``relu(conv2d(input, weight) + bias + residual)``. Input: (N, C, H, W) or (C, H, W), of
    any floating dtype, which is the output's too; channels_last in, channels_last out.

    Attributes:
        values: (nonzeros,), the weight's non-zeros in row-major order.
        packed_mask: uint8, one bit a weight in row-major order: where they belong.
        bias: (out_channels,), of the batch norm too; or None.
    """

    def __init__(
        self,
        weight: Tensor,
        mask: Tensor,
        bias: Tensor | None = None,
        *,
        like: nn.Conv2d,
        relu: bool = False,
        fused: tuple[str, ...] = (),
    ) -> None:
        """Geometry and hooks are those of ``like``; ``fused`` is what ``repr`` shows."""
        super().__init__(weight, mask, bias)
        self.in_channels, self.out_channels = like.in_channels, like.out_channels
        self.kernel_size, self.stride = like.kernel_size, like.stride
        self.dilation, self.groups = like.dilation, like.groups
        self.padding, self.padding_mode = like.padding, like.padding_mode
        self.relu, self.fused = relu, fused
        self._pad_before, self._padding = _split_padding(like)

    @classmethod
    def from_masked(
        cls,
        layer: MaskedConv2d,
        bn: nn.BatchNorm2d | None = None,
        relu: bool = False,
        *,
        residual: bool = False,
    ) -> Self:
        """The non-zeros of a masked convolution, copied, and the layers behind it.

        Args:
            layer: not changed; its forward hooks are shared.
            bn: a batch norm with running statistics, applied to the layer's output.
            relu: whether a ReLU follows, behind the residual if there is one.
            residual: whether a residual will be passed; for ``repr`` only.

        Raises:
            TypeError: ``layer`` is no MaskedConv2d, or ``bn`` no BatchNorm2d.
            ValueError: ``bn`` has no running statistics, or another number of channels.
        """
        if not isinstance(layer, MaskedConv2d):
            raise TypeError(f"layer: expected a MaskedConv2d, got {type(layer).__qualname__}")
        weight, bias = layer.weight.detach(), layer.bias
        if bn is not None:
            weight, bias = fold_batch_norm(weight, bias, bn)
        parts = {"bn": bn is not None, "residual": residual, "relu": relu}
        fused = tuple(name for name, there in parts.items() if there)
        made = cls(weight, layer.mask, bias, like=layer, relu=relu, fused=fused)
        _copy_hooks(layer, made)
        return made.train(layer.training)

    def forward(self, input: Tensor, residual: Any = None) -> Tensor:
        """``residual`` is added before the ReLU, as ``+`` would add it: broadcast, or a number."""
        input = self._input(input, residual)
        if self._pad_before is not None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, self._pad_before, mode=mode)
        if residual is None or self._can_add(input, residual):
            return self._convolve(input, residual, self.relu)
        output: Tensor = self._convolve(input, None, relu=False) + residual
        return output.relu() if self.relu else output

    def _can_add(self, input: Tensor, residual: Any) -> bool:
        """Whether the residual has shape and dtype of the output, as the operator wants it."""
        if not isinstance(residual, Tensor) or input.dim() != 4:
            return False
        size = output_size(input, self.weight_shape, self.stride, self._padding, self.dilation)
        same_type = residual.dtype == input.dtype and residual.device == input.device
        return same_type and tuple(residual.shape) == size

    def _convolve(self, input: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        batched = input.dim() != 3
        output: Tensor = torch.ops.granet.compressed_conv2d(
            input if batched else input.unsqueeze(0),
            self.values,
            self.packed_mask,
            self.bias,
            residual,
            self.weight_shape,
            self.stride,
            self._padding,
            self.dilation,
            self.groups,
            relu,
            algorithm=self.algorithm,
        )
        return output if batched else output.squeeze(0)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        defaults = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
        parts += [f"stride={self.stride}"]
        parts += [
            f"{name}={getattr(self, name)}"
            for name, default in defaults.items()
            if getattr(self, name) != default
        ]
        return ", ".join([*parts, *_described(self)])


class CompressedLinear(CompressedLayer):
    """A linear layer that holds only non-zeros, with the ReLU that follows: for inference.

    Input: (..., in_features); attributes as in :class:`CompressedConv2d`.
    """

    def __init__(
        self,
        weight: Tensor,
        mask: Tensor,
        bias: Tensor | None = None,
        *,
        relu: bool = False,
    ) -> None:
        super().__init__(weight, mask, bias)
        self.out_features, self.in_features = self.weight_shape
        self.relu, self.fused = relu, ("relu",) if relu else ()

    @classmethod
    def from_masked(cls, layer: MaskedLinear, relu: bool = False) -> Self:
        """The non-zeros of a masked linear layer, copied, with a ReLU behind if ``relu``.

        Raises:
            TypeError: ``layer`` is no MaskedLinear.
        """
        if not isinstance(layer, MaskedLinear):
            raise TypeError(f"layer: expected a MaskedLinear, got {type(layer).__qualname__}")
        made = cls(layer.weight.detach(), layer.mask, layer.bias, relu=relu)
        _copy_hooks(layer, made)
        return made.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        input = self._input(input)
        return torch.ops.granet.compressed_linear(  # type: ignore[no-any-return]
            input,
            self.values,
            self.packed_mask,
            self.bias,
            self.weight_shape,
            self.relu,
            algorithm=self.algorithm,
        )

    def extra_repr(self) -> str:
        return ", ".join([f"{self.in_features}, {self.out_features}", *_described(self)])


def _described(layer: CompressedConv2d | CompressedLinear) -> list[str]:
    """What ``repr`` shows of both: bias, non-zeros, fused parts."""
    numel = math.prod(layer.weight_shape)
    return [
        f"bias={layer.bias is not None}",
        f"nonzeros={layer.values.numel()}/{numel}",
        f"sparsity={layer.sparsity:.4f}",
        *([f"fused={'+'.join(layer.fused)}"] if layer.fused else []),
        *layer._shown_algorithm(layer.packed_mask),
    ]


def fold_batch_norm(
    weight: Tensor, bias: Tensor | None, bn: nn.BatchNorm2d
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that computes ``bn(conv(x))`` from running statistics.

    A filter is scaled as a whole, so zeros stay zeros. Computed in fp64 and rounded once.
    """
    if type(bn) is not nn.BatchNorm2d:
        raise TypeError(f"bn: expected a BatchNorm2d, got {type(bn).__qualname__}")
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("bn: expected running statistics, got a batch norm that keeps none")
    if bn.num_features != weight.size(0):
        raise ValueError(f"bn: expected {weight.size(0)} channels, got {bn.num_features}")
    scale = (bn.running_var.double() + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.double()
    shift = -bn.running_mean.double() if bias is None else bias.double() - bn.running_mean.double()
    shift = shift * scale
    if bn.bias is not None:
        shift = shift + bn.bias.double()
    folded = weight.double() * scale.view(-1, 1, 1, 1)
    return folded.to(weight.dtype), shift.to(weight.dtype)


def _split_padding(layer: nn.Conv2d) -> tuple[tuple[int, ...] | None, tuple[int, int]]:
    """What ``F.pad`` must do first, and the even padding that is left to the operator."""
    if layer.padding_mode != "zeros":
        before = tuple(layer._reversed_padding_repeated_twice)
        return (before if any(before) else None), (0, 0)
    if not isinstance(layer.padding, str):
        height, width = layer.padding
        return None, (height, width)
    if layer.padding == "same":  # where the total is odd, one more on the right or at the bottom
        height, width = (
            d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)
        )
        odd = (0, width % 2, 0, height % 2)
        return (odd if any(odd) else None), (height // 2, width // 2)
    return None, (0, 0)  # "valid"
