"""A whole ResNet-50 training step with masked layers and MaskedSGD, beside the dense one of training.py."""

from __future__ import annotations

import functools

import torch
from torch.nn import functional

from bench.registry import Case, Setting, Yardstick, register
from bench.resnet50 import ResNet
from bench.yardsticks.ours import BACKENDS, Backend, computed_by, random_masks
from bench.yardsticks.step import LEARNING_RATE, MOMENTUM, SPARSITY, WEIGHT_DECAY
from bench.yardsticks.training import make_batch

OPERATORS = ("masked_conv2d", "masked_conv2d_backward", "masked_sgd_")


def build_training(
    backend: Backend | None, dtype: torch.dtype, has_step: bool, setting: Setting
) -> Case:
    """Forward and backward, and the optimizer's step where ``has_step``; fp16 with loss scaling.

    Without a backend the dense network, for rows that training.py has not.
    """
    from granet_kernels import MaskedSGD, masked_layers, sparsify

    device = setting.device
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    batch = make_batch(setting)
    torch.manual_seed(setting.seed)
    with device:
        model = ResNet(setting.size).to(memory_format=torch.channels_last).train()
    options = {"lr": LEARNING_RATE, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
    if backend:
        layers = list(masked_layers(sparsify(model)).values())
        shapes = [tuple(layer.weight.shape) for layer in layers]
        for layer, mask in zip(
            layers, random_masks(shapes, SPARSITY, "uniform", setting), strict=True
        ):
            layer.mask = mask
    kind = MaskedSGD if backend else torch.optim.SGD
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

    case = {"around": computed_by(backend, setting, *OPERATORS)} if backend else {}
    return Case(
        run=run,
        n_tensors=len(list(model.parameters())),
        n_weights=sum(param.numel() for param in model.parameters()),
        items=len(batch.labels),
        **case,
    )


def _row(backend: Backend | None, dtype: torch.dtype, has_step: bool) -> Yardstick:
    name = "resnet50_step" if has_step else "resnet50_gradients"
    return Yardstick(
        group="training",
        name=name,
        variant=backend or "dense",
        build=functools.partial(build_training, backend, dtype, has_step),
        dtype=str(dtype).removeprefix("torch."),
        sparsity=SPARSITY if backend else None,
        baseline="resnet50_step/dense_fused" if has_step else "resnet50_gradients/dense",
    )


register(
    _row(None, torch.bfloat16, False),
    *(_row(backend, torch.bfloat16, False) for backend in BACKENDS),
    *(_row(backend, torch.bfloat16, True) for backend in BACKENDS),
    _row("cuda", torch.float16, True),
)
