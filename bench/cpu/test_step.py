"""MaskedSGD's step on ResNet-50's weights, against torch's fused one and other ways to mask it.

And with an average of the weights, against the fused step and torch's average behind it.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bench.cpu import verdict
from bench.cpu.race import Contender, Run, whole
from bench.cpu.targets import STEP
from bench.cpu.tensors import Tensors, make_tensors
from bench.published import PublishedMasking
from granet_kernels import MaskedSGD

SECONDS = 4.0
MEASURE = "step"
LR, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 1e-4
OPTIONS = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}

FUSED, PUBLISHED, COMPILED = "torch SGD fused", "published masking", "torch.compile, float mask"
OURS = "MaskedSGD"
FUSED_AVERAGED, OURS_AVERAGED = "torch SGD fused, AveragedModel", "MaskedSGD, average_into"
AVERAGED_MEASURE = "step and average"
DECAY = 0.999
# Each in memory of its own, of which the fastest stands for all: where pages lie is chance, and six
# such copies of the fused step took 11.8 to 14.9 ms in one race.
COPIES = 3


def pytest_generate_tests(metafunc):
    quick = metafunc.config.getoption("--quick")
    sparsities = (0.0, 0.9) if quick else tuple(STEP)
    if metafunc.function is test_averaged_step:
        sparsities = tuple(filter(None, sparsities))  # what a mask saves, not what a pass does
    metafunc.parametrize("sparsity", sparsities)


@pytest.fixture(autouse=True)
def fresh_memory():
    """No memory of an earlier race, which MaskedSGD has moved into large pages: torch does not do that."""
    gc.collect()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "malloc_trim"):  # glibc's
        libc.malloc_trim(0)


def settled(step: Callable[[], object], measure: str = MEASURE) -> Run:
    """With all that is created, compiled or moved into large pages at first behind it."""
    for _ in range(3):
        step()
    return whole(measure, step)


def fused(tensors: Tensors) -> Run:
    return settled(torch.optim.SGD(tensors.parameters(masked=False), fused=True, **OPTIONS).step)


def published(tensors: Tensors) -> Run:
    """Torch's fused step, then the released code's masking."""
    params = tensors.parameters(masked=False)
    optimizer = torch.optim.SGD(params, fused=True, **OPTIONS)
    masking = PublishedMasking(params, optimizer, tensors.masks)

    def step() -> None:
        optimizer.step()
        masking.apply_masks()

    return settled(step)


def masked_step(weight: Tensor, grad: Tensor, momentum: Tensor, mask: Tensor) -> None:
    """What a compiler is given to fuse into one pass."""
    momentum.mul_(MOMENTUM).add_(grad).add_(weight, alpha=WEIGHT_DECAY).mul_(mask)
    weight.add_(momentum, alpha=-LR).mul_(mask)


_compiled = torch.compile(masked_step, fullgraph=True, dynamic=False)


def compiled(tensors: Tensors) -> Run:
    """All weights as one flat tensor: the strongest form, compiled to a single loop."""
    weight = torch.cat([weight.flatten() for weight in tensors.weights])
    grad = torch.cat([grad.flatten() for grad in tensors.grads])
    mask = torch.cat([mask.flatten() for mask in tensors.masks]).float()
    momentum = torch.zeros_like(weight)
    return settled(lambda: _compiled(weight, grad, momentum, mask))


def ours(tensors: Tensors) -> Run:
    return settled(MaskedSGD(tensors.parameters(masked=True), **OPTIONS).step)


def fused_averaged(tensors: Tensors) -> Run:
    """Torch's fused step, then a pass over all weights and averages."""
    model = nn.ParameterList(tensors.parameters(masked=False))
    optimizer = torch.optim.SGD(model.parameters(), fused=True, **OPTIONS)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))

    def step() -> None:
        optimizer.step()
        average.update_parameters(model)

    return settled(step, AVERAGED_MEASURE)


def ours_averaged(tensors: Tensors) -> Run:
    params = tensors.parameters(masked=True)
    optimizer = MaskedSGD(params, **OPTIONS)
    optimizer.average_into([param.detach().clone() for param in params], DECAY)
    return settled(optimizer.step, AVERAGED_MEASURE)


def _contender(
    role: str, build: Callable[[Tensors], Run], tensors: Tensors, variant: str = ""
) -> Contender:
    return Contender(role=role, variant=variant, build=lambda: build(tensors))


def _in_turn(*jobs: tuple[str, Callable[[Tensors], Run], Tensors]) -> list[Contender]:
    """Copies of each, so that none comes behind another one with its gradients."""
    return [_contender(*job, f"copy {copy}") for copy in range(COPIES) for job in jobs]


def test_step(sparsity, threads, effort, race, ledger):
    dense = make_tensors(0.0)
    tensors = make_tensors(sparsity)
    contenders = _in_turn((FUSED, fused, dense), (OURS, ours, tensors))
    contenders.append(_contender(PUBLISHED, published, tensors))
    if not effort.quick:  # compiling takes longer than all the rest
        contenders.append(_contender(COMPILED, compiled, tensors))
    done = race(contenders, SECONDS)
    for baseline in (FUSED, PUBLISHED, COMPILED):
        row = verdict.row(
            done,
            group="step",
            case=f"ResNet-50's {len(tensors.weights)} weights, {tensors.numel / 1e6:.1f} M",
            measure=MEASURE,
            threads=threads,
            sparsity=sparsity,
            baseline=baseline,
            ours=OURS,
            operator="masked_sgd_",
            cost=baseline == FUSED,
            target=STEP[sparsity] if baseline == FUSED else None,
        )
        ledger += [row] if row else []
    if reason := done.failure(OURS):
        pytest.fail(reason)


def test_averaged_step(sparsity, threads, effort, race, ledger):
    tensors = make_tensors(sparsity)
    contenders = _in_turn(
        (FUSED_AVERAGED, fused_averaged, make_tensors(0.0)),
        (OURS_AVERAGED, ours_averaged, tensors),
    )
    done = race(contenders, SECONDS)
    row = verdict.row(
        done,
        group="step",
        case=f"ResNet-50's {len(tensors.weights)} weights and their average, {tensors.numel / 1e6:.1f} M",
        measure=AVERAGED_MEASURE,
        threads=threads,
        sparsity=sparsity,
        baseline=FUSED_AVERAGED,
        ours=OURS_AVERAGED,
        operator="masked_sgd_",
    )
    ledger += [row] if row else []
    if reason := done.failure(OURS_AVERAGED):
        pytest.fail(reason)
