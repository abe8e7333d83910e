"""Our operators, on the tensors of the yardsticks beside which they stand.

Bytes are those of the Triton backend's own accounts, whoever computes: on a GPU it is that backend, or
the row fails. What is measured is imported where a row is built: if that cannot be, it costs these rows
alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.registry import Case, Setting, Yardstick, register
from bench.resnet50 import ResNet, is_weight, kaiming_weights, parameter_shapes, weight_shapes
from bench.yardsticks.selection import DROP_FRACTION, SPARSITY_AFTER, SPARSITY_BEFORE
from bench.yardsticks.step import FUSED, LEARNING_RATE, MOMENTUM, SPARSITY, WEIGHT_DECAY
from bench.yardsticks.training import make_batch

Distribution = Literal["uniform", "erk"]

SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)
ERK_SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
ACCOUNT = "sectors, granet_kernels/backends/triton/accounts.py"


@dataclass(frozen=True, kw_only=True, slots=True)
class Masked:
    """The network's weights between backward and step; +0.0 where the mask is 0, momenta too."""

    weights: list[Tensor]
    grads: list[Tensor]
    momenta: list[Tensor]
    masks: list[Tensor]
    """Packed."""

    @property
    def numel(self) -> int:
        """Of all weights."""
        return sum(weight.numel() for weight in self.weights)


def expect_triton(operator: str, setting: Setting) -> None:
    """A row of a slower backend under this name would be a lie."""
    from granet_kernels.ops import backend_for

    backend = backend_for(operator, setting.device.type)
    if setting.device.type == "cuda" and backend != "triton":
        raise RuntimeError(f"{operator}: expected the triton backend, got {backend}")


def random_masks(
    shapes: list[tuple[int, ...]], sparsity: float, distribution: Distribution, setting: Setting
) -> list[Tensor]:
    """bool, each weight by itself; the layers' fractions as the distribution has them."""
    from granet.distributions import layer_budgets

    generator = torch.Generator(setting.device).manual_seed(setting.seed + 1)
    masks = [torch.rand(shape, device=setting.device, generator=generator) for shape in shapes]
    budgets = layer_budgets(shapes, sparsity, distribution)
    return [mask < budget / mask.numel() for mask, budget in zip(masks, budgets, strict=True)]


def make_masked(sparsity: float, distribution: Distribution, setting: Setting) -> Masked:
    """Kaiming weights, normal gradients and momenta."""
    from granet_kernels import pack_mask

    shapes = weight_shapes(setting.size)
    weights = kaiming_weights(shapes, setting.device, setting.seed)
    masks = random_masks(shapes, sparsity, distribution, setting)
    grads = [torch.randn_like(weight) * 1e-3 for weight in weights]
    momenta = [torch.randn_like(weight) * 1e-3 for weight in weights]
    for tensors in (weights, momenta):
        for tensor, mask in zip(tensors, masks, strict=True):
            tensor.masked_fill_(~mask, 0.0)
    packed = [pack_mask(mask) for mask in masks]
    return Masked(weights=weights, grads=grads, momenta=momenta, masks=packed)


def build_sgd(sparsity: float, distribution: Distribution, setting: Setting) -> Case:
    """One call of masked_sgd_ for all weights."""
    from granet_kernels.backends.triton.sgd import masked_sgd_bytes

    expect_triton("masked_sgd_", setting)
    state = make_masked(sparsity, distribution, setting)

    def run() -> None:
        torch.ops.granet.masked_sgd_(
            state.weights,
            state.grads,
            state.momenta,
            state.masks,
            lr=LEARNING_RATE,
            momentum=MOMENTUM,
            dampening=0.0,
            weight_decay=WEIGHT_DECAY,
            nesterov=False,
            maximize=False,
            first=False,
        )

    return Case(
        run=run,
        n_tensors=len(state.weights),
        n_weights=state.numel,
        model_bytes=masked_sgd_bytes(state.weights, state.momenta, state.masks),
        account=ACCOUNT,
    )


def build_optimizer(setting: Setting) -> Case:
    """MaskedSGD.step on all parameters, those without a mask by torch's fused update."""
    from granet_kernels import MaskedSGD, attach_mask
    from granet_kernels.backends.triton.sgd import masked_sgd_bytes

    expect_triton("masked_sgd_", setting)
    shapes = parameter_shapes(setting.size)
    state = make_masked(SPARSITY, "uniform", setting)
    weights = iter(zip(state.weights, state.masks, strict=True))
    params = []
    for shape, fresh in zip(
        shapes, kaiming_weights(shapes, setting.device, setting.seed), strict=True
    ):
        if is_weight(shape):
            weight, mask = next(weights)
            params.append(nn.Parameter(weight))
            attach_mask(params[-1], mask)
        else:
            params.append(nn.Parameter(fresh))
        params[-1].grad = torch.randn_like(params[-1]) * 1e-3
    optimizer = MaskedSGD(
        params, lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True
    )
    numel = sum(param.numel() for param in params)
    ours = masked_sgd_bytes(state.weights, state.momenta, state.masks)
    return Case(
        run=optimizer.step,
        n_tensors=len(params),
        n_weights=numel,
        model_bytes=ours + FUSED * (numel - state.numel),
        account=f"{ACCOUNT}; {FUSED} where there is no mask",
    )


def build_cast(masked: bool, setting: Setting) -> Case:
    """All weights in bfloat16, as autocast has them at every step: mask_cast, or Tensor.to."""
    state = make_masked(SPARSITY, "uniform", setting)
    numel = state.numel
    if not masked:
        return Case(
            run=lambda: [weight.to(torch.bfloat16) for weight in state.weights],
            n_tensors=len(state.weights),
            n_weights=numel,
            model_bytes=6 * numel,
            account="read 4 + write 2",
        )
    from granet_kernels.backends.triton.cast import mask_cast_bytes

    expect_triton("mask_cast", setting)
    pairs = list(zip(state.weights, state.masks, strict=True))
    return Case(
        run=lambda: [
            torch.ops.granet.mask_cast(weight, mask, torch.bfloat16) for weight, mask in pairs
        ],
        n_tensors=len(pairs),
        n_weights=numel,
        model_bytes=sum(mask_cast_bytes(*pair, torch.bfloat16) for pair in pairs),
        account=ACCOUNT,
    )


def build_update(whole: bool, setting: Setting) -> Case:
    """prune_ over all layers together, or with drop_regrow_ behind it, from the same state every time."""
    from granet.distributions import active_budget
    from granet_kernels.backends.triton.select_accounts import drop_regrow_bytes, prune_bytes

    for operator in ("prune_", "drop_regrow_"):
        expect_triton(operator, setting)
    state = make_masked(SPARSITY_BEFORE, "uniform", setting)
    spent = [*state.weights, *state.momenta, *state.masks]
    saved = [tensor.clone() for tensor in spent]
    keep = torch.tensor([active_budget(SPARSITY_AFTER, state.numel)], device=setting.device)
    fraction = torch.tensor(DROP_FRACTION, dtype=torch.float64, device=setting.device)

    def reset() -> None:
        torch._foreach_copy_(spent, saved)

    def prune() -> None:
        torch.ops.granet.prune_(state.weights, state.masks, keep, state.momenta)

    def drop_regrow() -> None:
        torch.ops.granet.drop_regrow_(
            state.weights, state.masks, state.grads, fraction, state.momenta
        )

    def run() -> None:
        prune()
        if whole:
            drop_regrow()

    moved = prune_bytes(state.weights, state.masks, keep, state.momenta)
    prune()
    if whole:
        lists = state.weights, state.masks, state.grads
        moved += drop_regrow_bytes(*lists, fraction, state.momenta)
        drop_regrow()
    if setting.device.type == "cuda":  # whoever waits for the device here raises
        torch.cuda.synchronize()
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    reset()
    return Case(
        run=run,
        n_tensors=len(state.weights),
        n_weights=state.numel,
        model_bytes=moved,
        account=ACCOUNT,
        reset=reset,
    )


def build_training(
    dtype: torch.dtype, masked: bool, has_step: bool, sparsity: float, setting: Setting
) -> Case:
    """Forward and backward, and the optimizer's step where ``has_step``; fp16 with loss scaling."""
    from granet_kernels import MaskedSGD, masked_layers, sparsify

    device = setting.device
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    batch = make_batch(setting)
    torch.manual_seed(setting.seed)
    with device:
        model = ResNet(setting.size).to(memory_format=torch.channels_last).train()
    options = {"lr": LEARNING_RATE, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
    if masked:
        for operator in ("masked_conv2d", "masked_conv2d_backward", "masked_sgd_"):
            expect_triton(operator, setting)
        layers = list(masked_layers(sparsify(model)).values())
        shapes = [tuple(layer.weight.shape) for layer in layers]
        for layer, mask in zip(
            layers, random_masks(shapes, sparsity, "uniform", setting), strict=True
        ):
            layer.mask = mask
    kind = MaskedSGD if masked else torch.optim.SGD
    optimizer = kind(model.parameters(), fused=True, **options)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def run() -> None:
        with torch.autocast(device.type, dtype=dtype):
            loss = functional.cross_entropy(model(batch.images), batch.labels)
        scaler.scale(loss).backward()
        if has_step:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return Case(
        run=run,
        n_tensors=len(list(model.parameters())),
        n_weights=sum(param.numel() for param in model.parameters()),
        items=len(batch.labels),
    )


def _sgd_row(distribution: Distribution, sparsity: float) -> Yardstick:
    return Yardstick(
        group="step",
        name="sgd_weights",
        variant=f"granet_{distribution}",
        build=functools.partial(build_sgd, sparsity, distribution),
        sparsity=sparsity,
        baseline="sgd_weights/torch_fused",
        graph=True,
    )


def _cast_row(variant: str, masked: bool) -> Yardstick:
    return Yardstick(
        group="step",
        name="cast_weights",
        variant=variant,
        build=functools.partial(build_cast, masked),
        sparsity=SPARSITY if masked else None,
        baseline="cast_weights/torch_to",
        graph=True,
    )


def _update_row(name: str, whole: bool) -> Yardstick:
    return Yardstick(
        group="selection",
        name=name,
        variant="granet",
        build=functools.partial(build_update, whole),
        sparsity=SPARSITY_AFTER,
        baseline="select/torch_sum",
        graph=True,
    )


def _training_row(name: str, dtype: torch.dtype, masked: bool, has_step: bool) -> Yardstick:
    return Yardstick(
        group="training",
        name=name,
        variant="granet" if masked else "dense",
        build=functools.partial(build_training, dtype, masked, has_step, SPARSITY),
        dtype=str(dtype).removeprefix("torch."),
        sparsity=SPARSITY if masked else None,
        baseline="resnet50_step/dense_fused" if has_step else f"{name}/dense",
    )


register(
    *(_sgd_row("uniform", sparsity) for sparsity in SPARSITIES),
    *(_sgd_row("erk", sparsity) for sparsity in ERK_SPARSITIES),
    Yardstick(
        group="step",
        name="sgd_all",
        variant="granet_optimizer",
        build=build_optimizer,
        sparsity=SPARSITY,
        baseline="sgd_all/torch_fused",
    ),
    _cast_row("torch_to", False),
    _cast_row("granet", True),
    _update_row("prune", False),
    _update_row("update", True),
    _training_row("resnet50_gradients", torch.bfloat16, False, False),
    _training_row("resnet50_gradients", torch.bfloat16, True, False),
    _training_row("resnet50_step", torch.bfloat16, True, True),
    _training_row("resnet50_step", torch.float16, True, True),
)
