"""Our optimizer step and cast, on the tensors of the yardsticks beside which they stand.

What is measured is imported where a row is built: if that cannot be, it costs these rows alone.
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor, nn

from bench.registry import Case, Setting, Yardstick, register
from bench.resnet50 import is_weight, kaiming_weights, parameter_shapes
from bench.yardsticks.ours import (
    BACKENDS,
    Backend,
    Distribution,
    Masked,
    computed_by,
    make_masked,
    masked_tensors,
)
from bench.yardsticks.step import (
    FUSED,
    LEARNING_RATE,
    MOMENTUM,
    SPARSITY,
    TINY_COUNTS,
    WEIGHT_DECAY,
    tiny_weights,
)

SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)
ERK_SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
HALF_SPARSITIES = (0.0, 0.9, 0.98)
ACCOUNT = "sectors of 32 bytes that are touched"

# Where a backend counts the bytes of its step and of its cast.
STEP_ACCOUNTS = {
    "cuda": "granet_kernels.backends.cuda.accounts",
    "triton": "granet_kernels.backends.triton.sgd",
}
CAST_ACCOUNTS = {
    "cuda": "granet_kernels.backends.cuda.accounts",
    "triton": "granet_kernels.backends.triton.cast",
}


def step_bytes(backend: Backend, state: Masked) -> int:
    """What the backend's step moves."""
    account = importlib.import_module(STEP_ACCOUNTS[backend]).masked_sgd_bytes
    return int(account(state.weights, state.momenta, state.masks))


def sgd_case(backend: Backend, state: Masked, setting: Setting) -> Case:
    """One call of masked_sgd_ for all weights."""

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
        model_bytes=step_bytes(backend, state),
        account=ACCOUNT,
        around=computed_by(backend, setting, "masked_sgd_"),
    )


def build_sgd(
    backend: Backend,
    sparsity: float,
    distribution: Distribution,
    dtype: torch.dtype,
    setting: Setting,
) -> Case:
    """All weights of the network."""
    return sgd_case(backend, make_masked(sparsity, distribution, setting, dtype), setting)


def build_tiny(backend: Backend, count: int, setting: Setting) -> Case:
    """So few numbers in so many tensors that launching is what takes time."""
    weights = tiny_weights(count, setting)
    masks = [torch.rand_like(weight) >= SPARSITY for weight in weights]
    return sgd_case(backend, masked_tensors(weights, masks), setting)


def build_optimizer(backend: Backend, setting: Setting) -> Case:
    """MaskedSGD.step on all parameters, those without a mask by torch's fused update."""
    from granet_kernels import MaskedSGD, attach_mask

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
    return Case(
        run=optimizer.step,
        n_tensors=len(params),
        n_weights=numel,
        model_bytes=step_bytes(backend, state) + FUSED * (numel - state.numel),
        account=f"{ACCOUNT}; {FUSED} where there is no mask",
        around=computed_by(backend, setting, "masked_sgd_"),
    )


def build_cast(backend: Backend, setting: Setting) -> Case:
    """mask_cast of all weights to bfloat16, as autocast has them at every step."""
    state = make_masked(SPARSITY, "uniform", setting)
    account = importlib.import_module(CAST_ACCOUNTS[backend]).mask_cast_bytes
    pairs = list(zip(state.weights, state.masks, strict=True))

    def run() -> list[Tensor]:
        return [torch.ops.granet.mask_cast(weight, mask, torch.bfloat16) for weight, mask in pairs]

    return Case(
        run=run,
        n_tensors=len(pairs),
        n_weights=state.numel,
        model_bytes=sum(account(*pair, torch.bfloat16) for pair in pairs),
        account=ACCOUNT,
        around=computed_by(backend, setting, "mask_cast"),
    )


def build_torch_cast(setting: Setting) -> Case:
    """Tensor.to of all weights, masks or none."""
    state = make_masked(SPARSITY, "uniform", setting)
    return Case(
        run=lambda: [weight.to(torch.bfloat16) for weight in state.weights],
        n_tensors=len(state.weights),
        n_weights=state.numel,
        model_bytes=6 * state.numel,
        account="read 4 + write 2",
    )


def _sgd_row(
    backend: Backend, distribution: Distribution, sparsity: float, dtype: torch.dtype
) -> Yardstick:
    return Yardstick(
        group="step",
        name="sgd_weights",
        variant=f"{backend}_{distribution}",
        build=functools.partial(build_sgd, backend, sparsity, distribution, dtype),
        dtype=str(dtype).removeprefix("torch."),
        sparsity=sparsity,
        baseline="sgd_weights/torch_fused",
        graph=True,
    )


def _rows_of(backend: Backend) -> list[Yardstick]:
    rows = [_sgd_row(backend, "uniform", sparsity, torch.float32) for sparsity in SPARSITIES]
    rows += [_sgd_row(backend, "erk", sparsity, torch.float32) for sparsity in ERK_SPARSITIES]
    for dtype in (torch.bfloat16, torch.float16):
        rows += [_sgd_row(backend, "uniform", sparsity, dtype) for sparsity in HALF_SPARSITIES]
    rows += [
        Yardstick(
            group="step",
            name=f"sgd_tiny_{count}",
            variant=backend,
            build=functools.partial(build_tiny, backend, count),
            sparsity=SPARSITY,
            baseline=f"sgd_tiny_{count}/torch_fused",
            graph=True,
        )
        for count in TINY_COUNTS
    ]
    rows.append(
        Yardstick(
            group="step",
            name="sgd_all",
            variant=f"{backend}_optimizer",
            build=functools.partial(build_optimizer, backend),
            sparsity=SPARSITY,
            baseline="sgd_all/torch_fused",
        )
    )
    rows.append(
        Yardstick(
            group="step",
            name="cast_weights",
            variant=backend,
            build=functools.partial(build_cast, backend),
            sparsity=SPARSITY,
            baseline="cast_weights/torch_to",
            graph=True,
        )
    )
    return rows


register(
    *(row for backend in BACKENDS for row in _rows_of(backend)),
    Yardstick(
        group="step",
        name="cast_weights",
        variant="torch_to",
        build=build_torch_cast,
        baseline="cast_weights/torch_to",
        graph=True,
    ),
)
