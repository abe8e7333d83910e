"""MaskedSGD: torch.optim.SGD whose step does not touch inactive weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from granet_kernels.averages import (
    averages_by_group,
    check_apart,
    check_complete,
    check_fit,
    move_averages,
)
from granet_kernels.bitmask import attached_mask, attachments_made
from granet_kernels.functional import unpack_mask, zero_inactive_
from granet_kernels.large_pages import gather_in_large_pages
from granet_kernels.layout import same_layout
from granet_kernels.ops.checks import check_average_decay
from granet_kernels.ops.define import without_dispatcher
from granet_kernels.step_plan import Batch, Facts, Others, Plan

_masked_sgd_ = without_dispatcher("masked_sgd_")


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

    Raises:
        ValueError: as torch.optim.SGD, and for a ``momentum_dtype`` that is not floating.

    On the CPU masked weights, their momenta and averages are moved into large pages where they lie
    (Linux 6.1 and later; ``GRANET_LARGE_PAGES=0`` declines), when they are new and after a mask has changed.

    :meth:`average_into` lets averages of the weights (EMA) follow every step; those of masked weights
    move in the same pass.

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

    def __getstate__(self) -> dict[str, Any]:
        """With the averages: copied or pickled in one piece with their model, they stay its own."""
        state: dict[str, Any] = super().__getstate__()
        return state | {"_averages": self._averages, "_average_decay": self._average_decay}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__.setdefault("_averages", [])  # by group; empty without averages
        self.__dict__.setdefault("_average_decay", 0.0)
        for group in self.param_groups:
            group.setdefault("momentum_dtype", self.defaults.get("momentum_dtype"))
        self._step_supports_amp_scaling = True  # GradScaler hands over grad_scale and found_inf
        self._mask_versions: dict[int, tuple[int, ...]] = {}  # by id(param)
        self._plans: dict[int, Plan] = {}  # by the place of the group

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. With a ``closure`` it is called first, and what it returns is returned."""
        loss = None
        if self._averages:
            check_complete(self._averages, self.param_groups)
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._skips_first_step():
            with torch.set_grad_enabled(self.defaults["differentiable"]):
                # All first: what is wrong with one group is said before another has been updated.
                prepared = [self._prepare(*numbered) for numbered in enumerate(self.param_groups)]
                for group, (plan, grads) in zip(self.param_groups, prepared, strict=True):
                    self._step_group(group, plan, grads)
        return loss

    def average_into(self, averages: Iterable[Tensor] | None, decay: float = 0.999) -> None:
        """Let averages of the parameters follow every step from now on.

        After each step average += (1 - decay) * (parameter - average), as ``AveragedModel`` with
        ``get_ema_multi_avg_fn(decay)`` has it from its second update on (the first is a copy), and
        which is then not needed. Those of masked weights are
        moved by the kernel that updates the weights, which neither reads nor writes inactive ones;
        where a mask changes, inactive averages are set to zero, as weights and momenta are. A step
        that a ``GradScaler`` declares infinite moves none. ::

            average = copy.deepcopy(model).float()
            optimizer.average_into(average.parameters(), decay=0.999)
            sparsifier.follow(average)  # of granet: the copy's layers have the masks, too

        Averages are no part of the optimizer's ``state_dict``: save the averaged model, and call this
        again where a run is resumed.

        Args:
            averages: one tensor for each parameter, in the order of the groups and of the parameters
                in each, with the parameter's shape, device and memory layout: fp32, and fp64 for fp64
                parameters (in 16 bits an average would stand still), in memory of its own. None: none
                from now on.
            decay: in [0, 1]; :attr:`average_decay`, which may be set between steps.

        Raises:
            ValueError: not as many as there are parameters, one that does not fit, or an impossible
                decay; nothing has changed then. The next step raises where parameters were added.
        """
        check_average_decay(decay)
        by_group = [] if averages is None else averages_by_group(averages, self.param_groups)
        params = [param for group in self.param_groups for param in group["params"]]
        grads = [param.grad for param in params if param.is_leaf]  # others' are asked for in vain
        momenta = [state.get("momentum_buffer") for state in self.state.values()]
        check_apart(by_group, [*params, *grads, *momenta])
        self._averages = by_group
        self._average_decay = float(decay)
        self._plans.clear()
        self._mask_versions.clear()  # nobody has looked at these averages' inactive elements

    @property
    def average_decay(self) -> float:
        """The share of the averages that a step leaves as it was, in [0, 1]."""
        return self._average_decay

    @average_decay.setter
    def average_decay(self, decay: float) -> None:
        check_average_decay(decay)
        self._average_decay = float(decay)

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
        there = sum(state.get("momentum_buffer") is not None for state in self.state.values())
        creates = there < sum(len(group["params"]) for group in self.param_groups) and any(
            group["momentum"] != 0 and param.grad is not None and self.momentum_of(param) is None
            for group in self.param_groups
            for param in group["params"]
        )
        return creates and bool(found_inf)

    def _prepare(self, place: int, group: dict[str, Any]) -> tuple[Plan, Sequence[Tensor | None]]:
        """A group's plan, and the gradients of this step."""
        grads = [param.grad for param in group["params"]]
        averages = self._averages[place] if self._averages else []
        plan = self._plans.get(place)
        if plan is None or not plan.is_of(self._facts(group, grads, plan.masks, averages)):
            plan = self._plans[place] = self._plan(group, grads, averages)
        return plan, grads

    def _step_group(
        self, group: dict[str, Any], plan: Plan, grads: Sequence[Tensor | None]
    ) -> None:
        for batch in plan.plain:
            self._step_plain(batch, batch.of(grads), group)
        if plan.masked:
            with torch.set_grad_enabled(False):
                for batch in plan.masked:
                    self._step_masked(batch, batch.of(grads), group)
        if plan.others.averages:
            found_inf = getattr(self, "found_inf", None)
            others = plan.others
            move_averages(others.averages, others.params, self._average_decay, found_inf)

    def _facts(
        self,
        group: dict[str, Any],
        grads: Sequence[Tensor | None],
        masks: Sequence[Tensor],
        averages: Sequence[Tensor],
    ) -> Facts:
        """What a plan follows from, as cheaply as it can be compared at every step.

        Which takes some 200 us of a step that has swept the caches of all Python's objects; so strides are
        hashed rather than kept, since each would be another line of memory to compare with.
        """
        params = group["params"]
        return Facts(
            equal=(
                hash(tuple([param.stride() for param in params])),
                [param.dtype for param in params],
                [grad is None for grad in grads],
                [mask._version for mask in masks],
                attachments_made(),
                group["differentiable"],
            ),
            same=[
                *params,
                *(state.get("momentum_buffer") for state in self.state.values()),
                *averages,
            ],
        )

    def _plan(
        self, group: dict[str, Any], grads: Sequence[Tensor | None], averages: Sequence[Tensor]
    ) -> Plan:
        """Sort the parameters by who updates them, and see to the invariant."""
        if averages:
            check_fit(averages, group["params"])
        # With and without momentum apart: torch's fused update cannot start one beside another.
        plain: dict[bool, Batch] = defaultdict(Batch)
        masked: dict[tuple[Any, ...], Batch] = defaultdict(Batch)
        others = Others()
        for place, (param, grad) in enumerate(zip(group["params"], grads, strict=True)):
            average = averages[place] if averages else None
            mask = attached_mask(param)
            if average is not None and (mask is None or grad is None or group["differentiable"]):
                others.add(param, average, mask)
            if grad is None:
                continue
            buffer = self.momentum_of(param)
            if mask is None or group["differentiable"]:
                plain[buffer is None].add(place, param, buffer)
            else:
                dtype = None if buffer is None else buffer.dtype
                masked[param.device, param.dtype, dtype].add(place, param, buffer, mask, average)
        batches = list(masked.values())
        has_news = [self._restore_invariant(batch) for batch in batches]
        if any(has_news):
            # Together, since many a page holds the end of one tensor and the beginning of another.
            gather_in_large_pages([tensor for batch in batches for tensor in batch.kept()])
        averages_of_others, masks_of_others = others.masked()
        zero_inactive_(averages_of_others, masks_of_others)
        masks = [*(mask for batch in batches for mask in batch.masks), *masks_of_others]
        return Plan(
            facts=self._facts(group, grads, masks, averages),
            plain=list(plain.values()),
            masked=batches,
            masks=masks,
            others=others,
        )

    def _step_plain(self, batch: Batch, grads: list[Tensor], group: dict[str, Any]) -> None:
        """Torch's own update; of a masked weight only when it is to be differentiable."""
        scaler = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
        scaled = scaler["found_inf"] is not None  # only torch's fused update takes these
        momenta = list(batch.momenta)
        if group["differentiable"]:
            grads = [_masked_grad(param) for param in batch.params]
        sgd(
            batch.params,
            grads,
            momenta,
            has_sparse_grad=any(grad.is_sparse for grad in grads),
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
            for param, buffer, old in zip(batch.params, momenta, batch.momenta, strict=True):
                if buffer is not old:
                    self.state[param]["momentum_buffer"] = buffer

    def _step_masked(self, batch: Batch, grads: list[Tensor], group: dict[str, Any]) -> None:
        if sparse := [grad.shape for grad in grads if grad.is_sparse]:
            raise ValueError(
                f"params: expected a dense gradient of a masked weight {tuple(sparse[0])}, got sparse"
            )
        momenta = batch.momenta if group["momentum"] != 0 else []
        first = bool(momenta) and momenta[0] is None
        if first:
            dtype = group["momentum_dtype"] or batch.params[0].dtype
            momenta = [torch.zeros_like(param, dtype=dtype) for param in batch.params]
            for param, buffer in zip(batch.params, momenta, strict=True):
                self.state[param]["momentum_buffer"] = buffer
        lr, weight_decay = group["lr"], group["weight_decay"]
        _masked_sgd_(
            batch.params,
            grads,
            momenta,
            batch.masks,
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
            averages=batch.averages,
            average_decay=self._average_decay,
        )

    def _restore_invariant(self, batch: Batch) -> bool:
        """Zero what became inactive behind our back: by hand, or by loading a mask or momentum.

        Returns:
            Whether anything of it was not seen before.
        """
        states: list[Tensor] = []
        masks: list[Tensor] = []
        lists = zip(batch.params, batch.masks, batch.momenta, strict=True)
        for i, (param, mask, buffer) in enumerate(lists):
            there = [param, *([] if buffer is None else [buffer]), *batch.averages[i : i + 1]]
            seen = (id(mask), mask._version, *map(id, there))
            if self._mask_versions.get(id(param)) == seen:
                continue
            self._mask_versions[id(param)] = seen
            states += there
            masks += [mask] * len(there)
        zero_inactive_(states, masks)
        return bool(states)


def _masked_grad(param: Tensor) -> Tensor:
    """With the invariant (inactive weights and momenta are zero), masking the gradient masks the update."""
    assert param.grad is not None
    mask = attached_mask(param)
    if mask is None:
        return param.grad
    return torch.where(unpack_mask(mask, param.shape, like=param), param.grad, 0.0)
