"""MaskedSGD: torch.optim.SGD whose step does not touch inactive weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from granet_kernels.bitmask import attached_mask
from granet_kernels.functional import unpack_mask, zero_inactive_
from granet_kernels.layout import same_layout

_ops = torch.ops.granet


class MaskedSGD(torch.optim.SGD):
    """``torch.optim.SGD`` for models with masked layers; without masks it is torch.optim.SGD.

    The weights of masked layers are found through their parameters. They are updated by one
    operator call for all of them, in which inactive weights and their momentum are neither read nor
    written, with arithmetic in fp32 (fp64 for fp64 weights); ``foreach`` and ``fused`` are about
    the other parameters, which torch updates itself.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable,
            fused: as in torch.optim.SGD.
        momentum_dtype: of the momentum of masked weights, for example fp32 beside bf16 weights; by
            default the weight's. It survives ``load_state_dict``.

    With a ``GradScaler`` the gradients are unscaled in the update, and a step with infinite
    gradients changes nothing; ``grad`` itself is left as it is. The one wait for the device under a
    scaler is at steps that would create momentum.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        momentum_dtype: torch.dtype | None = None,
    ) -> None:
        if momentum_dtype is not None and not momentum_dtype.is_floating_point:
            raise ValueError(f"momentum_dtype: expected a floating dtype, got {momentum_dtype}")
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self.defaults["momentum_dtype"] = momentum_dtype
        self.__setstate__({})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for group in self.param_groups:
            group.setdefault("momentum_dtype", self.defaults.get("momentum_dtype"))
        self._step_supports_amp_scaling = True  # GradScaler hands over grad_scale and found_inf
        self._mask_versions: dict[int, tuple[int, ...]] = {}  # by id(param)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. With a ``closure`` it is called first, and what it returns is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._skips_first_step():
            with torch.set_grad_enabled(self.defaults["differentiable"]):
                for group in self.param_groups:
                    self._step_group(group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim.SGD, but the momentum of masked weights keeps its dtype instead of taking theirs."""
        super().load_state_dict(state_dict)
        saved_ids = (i for group in state_dict["param_groups"] for i in group["params"])
        own = ((param, group) for group in self.param_groups for param in group["params"])
        for saved_id, (param, group) in zip(saved_ids, own, strict=True):
            buffer = state_dict["state"].get(saved_id, {}).get("momentum_buffer")
            if buffer is not None and attached_mask(param) is not None:
                dtype = group["momentum_dtype"] or buffer.dtype
                self.state[param]["momentum_buffer"] = buffer.to(param.device, dtype, copy=True)

    def momentum_of(self, param: Tensor) -> Tensor | None:
        """The momentum of a parameter, in the parameter's memory layout; None before its first step."""
        state = self.state.get(param)
        buffer: Tensor | None = None if state is None else state.get("momentum_buffer")
        if buffer is None or same_layout(buffer, param):
            return buffer
        moved = torch.empty_like(param, dtype=buffer.dtype).copy_(buffer)
        self.state[param]["momentum_buffer"] = moved
        return moved

    def _skips_first_step(self) -> bool:
        """Whether momentum would be created from infinite gradients, which nothing could mend later."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is None:
            return False
        creates = any(
            group["momentum"] != 0 and param.grad is not None and self.momentum_of(param) is None
            for group in self.param_groups
            for param in group["params"]
        )
        return creates and bool(found_inf)

    def _step_group(self, group: dict[str, Any]) -> None:
        # With and without momentum apart: torch's fused update cannot start one beside another.
        plain: dict[bool, list[Tensor]] = defaultdict(list)
        masked: dict[tuple[Any, ...], list[_Masked]] = defaultdict(list)
        for param in group["params"]:
            if param.grad is None:
                continue
            mask, buffer = attached_mask(param), self.momentum_of(param)
            if mask is None or group["differentiable"]:
                plain[buffer is None].append(param)
            else:
                self._restore_invariant(param, mask, buffer)
                buffer_dtype = None if buffer is None else buffer.dtype
                masked[param.device, param.dtype, buffer_dtype].append(_Masked(param, mask, buffer))
        for params in plain.values():
            self._step_plain(params, group)
        for weights in masked.values():
            self._step_masked(weights, group)

    def _step_plain(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Torch's own update; of a masked weight only when it is to be differentiable."""
        scaler = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
        scaled = scaler["found_inf"] is not None  # only torch's fused update takes these
        momenta = [self.momentum_of(param) for param in params]
        sgd(
            params,
            [_masked_grad(param) for param in params],
            momenta,
            has_sparse_grad=any(
                param.grad is not None and param.grad.is_sparse for param in params
            ),
            foreach=False if scaled else group["foreach"],
            fused=True if scaled else group["fused"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            **scaler,
        )
        if group["momentum"] != 0:
            for param, buffer in zip(params, momenta, strict=True):
                self.state[param]["momentum_buffer"] = buffer

    def _step_masked(self, weights: list[_Masked], group: dict[str, Any]) -> None:
        params = [weight.param for weight in weights]
        momenta = [weight.momentum for weight in weights] if group["momentum"] != 0 else []
        first = bool(momenta) and momenta[0] is None
        if first:
            dtype = group["momentum_dtype"] or params[0].dtype
            momenta = [torch.zeros_like(param, dtype=dtype) for param in params]
            for param, buffer in zip(params, momenta, strict=True):
                self.state[param]["momentum_buffer"] = buffer
        lr, weight_decay = group["lr"], group["weight_decay"]
        with torch.no_grad():
            _ops.masked_sgd_.default(
                params,
                [_strided_grad(param) for param in params],
                momenta,
                [weight.mask for weight in weights],
                lr=0.0 if isinstance(lr, Tensor) else lr,
                momentum=group["momentum"],
                dampening=group["dampening"],
                weight_decay=float(weight_decay),
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                first=first,
                lr_tensor=lr if isinstance(lr, Tensor) else None,
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
            )

    def _restore_invariant(self, param: Tensor, mask: Tensor, buffer: Tensor | None) -> None:
        """Zero what became inactive behind our back: by hand, or by loading a mask or momentum."""
        seen = (id(mask), mask._version, 0 if buffer is None else id(buffer))
        if self._mask_versions.get(id(param)) != seen:
            states = [param] if buffer is None else [param, buffer]
            zero_inactive_(states, [mask] * len(states))
            self._mask_versions[id(param)] = seen


class _Masked(NamedTuple):
    """A weight that the operator updates."""

    param: Tensor
    mask: Tensor
    momentum: Tensor | None


def _strided_grad(param: Tensor) -> Tensor:
    grad = param.grad
    assert grad is not None
    if grad.is_sparse:
        raise ValueError(
            f"params: expected a dense gradient of a masked weight {tuple(param.shape)}, got sparse"
        )
    return grad


def _masked_grad(param: Tensor) -> Tensor:
    """With the invariant (inactive weights and momenta are zero), masking the gradient masks the update."""
    assert param.grad is not None
    mask = attached_mask(param)
    if mask is None:
        return param.grad
    return torch.where(unpack_mask(mask, param.shape, like=param), param.grad, 0.0)
