"""MaskedConv2d and MaskedLinear: the layers of torch.nn with a 1-bit mask on the weight."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from granet_kernels.bitmask import BitMask, attach_mask, attached_mask, detach_mask
from granet_kernels.functional import masked_conv2d, masked_linear, zero_inactive_
from granet_kernels.layout import storage_order
from granet_kernels.nn.algorithm import HasAlgorithm

if TYPE_CHECKING:
    from collections.abc import Callable

    _Base = nn.Module
else:
    _Base = object


class MaskedLayer(HasAlgorithm, _Base):
    """What the masked layers share: the mask beside ``weight``, and its life with the module.

    ``packed_mask`` is a buffer that is changed in place for ever, so that nothing recompiles or is
    captured anew when the mask changes. ``dense_grad`` is a flag on the device for the same reason;
    the engine sets it for the one step whose gradient scores the inactive weights.

    Invariant: an inactive weight is +0.0. The output does not rest on it (it is that of ``weight *
    mask`` whatever an optimizer wrote), saving and exporting do.
    """

    dense_type: ClassVar[type[nn.Module]]
    """The layer of torch.nn that this one extends."""

    weight: Tensor
    packed_mask: Tensor
    dense_grad: Tensor

    @classmethod
    def from_dense(cls, layer: nn.Module) -> Self:
        """A masked layer, all weights active, that shares the parameters and hooks of a dense one."""
        masked = copy.copy(layer)
        for container in ("_parameters", "_buffers", "_modules"):
            masked.__dict__[container] = layer.__dict__[container].copy()
        masked._non_persistent_buffers_set = layer._non_persistent_buffers_set.copy()
        return cls.adopt(masked)

    @classmethod
    def adopt(cls, layer: nn.Module) -> Self:
        """Turn a dense layer into a masked one in place, all weights active."""
        if type(layer) is not cls.dense_type:
            expected = f"torch.nn.{cls.dense_type.__name__}, not a subclass of it"
            raise TypeError(f"layer: expected {expected}, got {type(layer).__qualname__}")
        if reason := cls.cannot_adopt(layer):
            raise ValueError(f"layer: {reason}")
        layer.__class__ = cls
        assert isinstance(layer, cls)
        layer._init_mask()
        return layer

    @staticmethod
    def cannot_adopt(layer: nn.Module) -> str | None:
        """Why a dense layer cannot be masked; None if it can."""
        weight = layer._parameters.get("weight")
        if weight is None:
            return "expected weight to be a parameter, got one computed from others"
        if not weight.is_floating_point():
            return f"expected a floating weight, got {weight.dtype}"
        return None

    def to_dense(self) -> nn.Module:
        """A layer of torch.nn with copies of the masked weight, the bias and the hooks."""
        return copy.deepcopy(self).shed()

    def shed(self) -> nn.Module:
        """Turn this layer into a dense one in place; inactive weights are zeros like any others."""
        if not self.weight.is_meta:
            zero_inactive_([self.weight], [self.packed_mask])
        detach_mask(self.weight)
        del self._buffers["packed_mask"], self._buffers["dense_grad"]
        self._non_persistent_buffers_set.discard("dense_grad")
        self.__class__ = self.dense_type  # type: ignore[assignment]
        return self

    @property
    def mask(self) -> Tensor:
        """The mask as a bool tensor of the weight's shape: True where active. A copy; assign to change it."""
        return self.bitmask.to_bool()

    @mask.setter
    def mask(self, mask: Tensor) -> None:
        """Take a bool tensor of the weight's shape; weights that become inactive are set to zero."""
        if (
            not isinstance(mask, Tensor)
            or mask.dtype != torch.bool
            or mask.shape != self.weight.shape
        ):
            got = (
                f"{mask.dtype} {tuple(mask.shape)}"
                if isinstance(mask, Tensor)
                else type(mask).__name__
            )
            raise ValueError(
                f"mask: expected a bool tensor of shape {tuple(self.weight.shape)}, got {got}"
            )
        self._set_mask(BitMask.from_bool(mask.to(self.weight.device), like=self.weight))

    @property
    def bitmask(self) -> BitMask:
        """The mask as a value, sharing the memory of ``packed_mask``."""
        attached_mask(self.weight)  # brings the bits into the weight's order, should that be new
        return BitMask(self.packed_mask, self.weight.shape, storage_order(self.weight))

    @property
    def sparsity(self) -> float:
        """The fraction of weights that are inactive. Waits for the device."""
        return self.bitmask.sparsity()

    def count_active(self) -> int:
        """Active weights. Waits for the device."""
        return self.bitmask.count()

    def reset_parameters(self) -> None:
        """As the parent's; all weights become active."""
        super().reset_parameters()  # type: ignore[misc]
        if "packed_mask" in self._buffers:
            self.dense_grad.zero_()
            self._set_mask(BitMask.full(self.weight))

    def _mask_of(self, weight: Tensor) -> Tensor:
        """What the forward pass masks with; a weight that changed its layout takes the bits along."""
        if not torch.compiler.is_compiling():  # a compiled graph is for one layout anyway
            attached_mask(weight)
        return self.packed_mask

    def extra_repr(self) -> str:
        sparsity = "?" if self.packed_mask.is_meta else f"{self.sparsity:.4f}"
        parts = [super().extra_repr(), f"sparsity={sparsity}"]
        return ", ".join([*parts, *self._shown_algorithm(self.packed_mask)])

    def _init_mask(self) -> None:
        packed = attached_mask(self.weight)  # two layers of one weight have one mask
        if packed is None:
            packed = BitMask.full(self.weight).packed
        flag = torch.zeros((), dtype=torch.bool, device=self.weight.device)
        self.register_buffer("packed_mask", packed)
        self.register_buffer("dense_grad", flag, persistent=False)
        attach_mask(self.weight, packed)

    def _set_mask(self, mask: BitMask) -> None:
        self.packed_mask.copy_(mask.in_order_of(self.weight).packed)
        attach_mask(self.weight, self.packed_mask)
        # The mask is of a whole weight: in one in shards (DTensor) the engine restores the invariant.
        if not self.weight.is_meta and not is_traceable_wrapper_subclass(self.weight):
            zero_inactive_([self.weight], [self.packed_mask])

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """A new weight takes over this layer's mask; one that has a mask (a tied one) brings it."""
        masked = "packed_mask" in self._buffers and self._parameters.get("weight") is not None
        before = self.bitmask if masked and name == "weight" else None
        super().register_parameter(name, param)
        if before is not None and param is not None:
            self._follow(param, before)

    def _follow(self, weight: nn.Parameter, before: BitMask) -> None:
        packed = attached_mask(weight)
        if packed is None:
            known = before.shape == weight.shape and not before.packed.is_meta
            mask = before.in_order_of(weight) if known else BitMask.full(weight)
            # a copy, for the old weight may live on in another layer
            packed = mask.packed.to(weight.device, copy=True)
        self._buffers["packed_mask"] = packed
        if self.dense_grad.device != weight.device:
            self._buffers["dense_grad"] = torch.zeros((), dtype=torch.bool, device=weight.device)
        attach_mask(weight, packed)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of copies and pickles: the new parameter has the new mask."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        attach_mask(self.weight, self.packed_mask)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts: the mask stays uint8 and follows the weight's order in memory."""
        before = self.bitmask
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        attached = attached_mask(self.weight)
        if attached is not None and attached is not before.packed:
            self._buffers["packed_mask"] = attached  # a layer of the same weight was here first
            return self
        if attached is self.packed_mask:  # not moved, and in the weight's order
            return self
        if self.packed_mask.dtype != torch.uint8:  # Module.type() casts every buffer
            self._buffers["packed_mask"] = before.packed.to(self.weight.device)
            self._buffers["dense_grad"] = self.dense_grad.bool()
        if before.packed.is_meta and not self.packed_mask.is_meta:  # to_empty() leaves garbage
            self.packed_mask.copy_(BitMask.full(self.weight).packed)
            self.dense_grad.zero_()
        elif storage_order(self.weight) != before.order:
            moved = BitMask(self.packed_mask, before.shape, before.order)
            self.packed_mask.copy_(moved.in_order_of(self.weight).packed)
        attach_mask(self.weight, self.packed_mask)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """The mask is saved in row-major order: a checkpoint does not depend on the memory format."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}packed_mask"] = self.bitmask.canonical()

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
        """From a weight without a mask all become active; without the weight nothing changes."""
        key, weight = f"{prefix}packed_mask", state_dict.get(f"{prefix}weight")
        mask = None
        try:
            if key in state_dict:
                mask = BitMask.from_canonical(state_dict[key], self.weight.shape)
        except ValueError as error:
            error_msgs.append(f"{key}: {error}")
            return
        own = {name: value for name, value in state_dict.items() if name != key}
        self._non_persistent_buffers_set.add("packed_mask")  # else the parent misses or replaces it
        try:
            super()._load_from_state_dict(
                own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            self._non_persistent_buffers_set.discard("packed_mask")
        if weight is not None and weight.shape != self.weight.shape:
            return  # the parent has reported it, and kept the weight
        if mask is not None:
            packed = mask.packed.to(self.weight.device)
            self._set_mask(BitMask(packed, mask.shape, mask.order))
        elif weight is not None:
            self._set_mask(BitMask.full(self.weight))


class MaskedConv2d(MaskedLayer, nn.Conv2d):
    """``torch.nn.Conv2d`` with a mask on the weight; the same constructor and parameters.

    New layers are dense: every weight is active until a sparsifier, or you, change the mask.

    Attributes:
        weight: (out_channels, in_channels / groups, *kernel_size); +0.0 where inactive.
        packed_mask: uint8 buffer, one bit a weight in storage order; changed in place, saved
            canonically.
        mask: the same as a bool tensor of the weight's shape; assign one to change it.
        dense_grad: bool buffer of one element; while True, backward gives inactive weights a
            gradient too.
    """

    dense_type = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self._init_mask()

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        elif padding == "valid":
            padding = (0, 0)
        elif padding == "same":
            input, padding = self._pad_unevenly(input)
        return masked_conv2d(
            input,
            weight,
            self._mask_of(weight),
            bias,
            self.stride,
            padding,  # type: ignore[arg-type]
            self.dilation,
            self.groups,
            dense_grad=self.dense_grad,
            algorithm=self.algorithm,
        )

    def _pad_unevenly(self, input: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Padding "same": where the total is odd, one more column or row on the right or at the bottom."""
        total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        odd_height, odd_width = (t % 2 for t in total)
        if odd_height or odd_width:
            input = F.pad(input, (0, odd_width, 0, odd_height))
        return input, (total[0] // 2, total[1] // 2)


class MaskedLinear(MaskedLayer, nn.Linear):
    """``torch.nn.Linear`` with a mask on the weight; the same constructor and parameters.

    Attributes as in :class:`MaskedConv2d`; ``weight`` is (out_features, in_features).
    """

    dense_type = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._init_mask()

    def forward(self, input: Tensor) -> Tensor:
        mask = self._mask_of(self.weight)
        return masked_linear(
            input,
            self.weight,
            mask,
            self.bias,
            dense_grad=self.dense_grad,
            algorithm=self.algorithm,
        )
