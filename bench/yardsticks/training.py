"""A whole ResNet-50 training step under autocast: dense, and with the published masking."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.published import PublishedMasking
from bench.registry import Case, Setting, Yardstick, register
from bench.resnet50 import ResNet, is_weight
from bench.yardsticks.step import SPARSITY, Loop, make_sgd


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Synthetic images, (B, 3, H, W) fp32 channels_last, and labels, on the device."""

    images: Tensor
    labels: Tensor


@functools.lru_cache(maxsize=1)
def make_batch(setting: Setting) -> Batch:
    """256 images of 224x224; all rows share them."""
    count, side = (2, 32) if setting.quick else (256, 224)
    generator = torch.Generator(setting.device).manual_seed(setting.seed)
    images = torch.randn(count, 3, side, side, device=setting.device, generator=generator)
    labels = torch.randint(
        setting.size.classes, (count,), device=setting.device, generator=generator
    )
    return Batch(images=images.contiguous(memory_format=torch.channels_last), labels=labels)


def make_masks(weights: list[nn.Parameter], setting: Setting) -> list[Tensor]:
    """Uniform random masks in the weights' own memory layout."""
    torch_state = torch.Generator(setting.device).manual_seed(setting.seed + 1)
    return [
        torch.empty_like(weight, requires_grad=False).uniform_(generator=torch_state) >= SPARSITY
        for weight in weights
    ]


def build_training(dtype: torch.dtype, loop: Loop, masked: bool, setting: Setting) -> Case:
    """Forward, backward, step; fp16 with loss scaling, bf16 without."""
    device = setting.device
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    batch = make_batch(setting)
    torch.manual_seed(setting.seed)
    with device:
        model = ResNet(setting.size).to(memory_format=torch.channels_last).train()
    params = list(model.parameters())
    optimizer = make_sgd(params, loop)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    weights = [param for param in params if is_weight(param.shape)]
    masking = PublishedMasking(weights, optimizer, make_masks(weights, setting)) if masked else None
    if masking is not None:
        masking.apply_masks()

    def run() -> None:
        with torch.autocast(device.type, dtype=dtype):
            loss = functional.cross_entropy(model(batch.images), batch.labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if masking is not None:
            masking.apply_masks()
        optimizer.zero_grad(set_to_none=True)

    return Case(
        run=run,
        n_tensors=len(params),
        n_weights=sum(param.numel() for param in params),
        items=len(batch.labels),
    )


def _row(dtype: torch.dtype, loop: Loop, masked: bool) -> Yardstick:
    return Yardstick(
        group="training",
        name="resnet50_step",
        variant=f"{'published' if masked else 'dense'}_{loop}",
        build=functools.partial(build_training, dtype, loop, masked),
        dtype=str(dtype).removeprefix("torch."),
        sparsity=SPARSITY if masked else None,
        baseline="resnet50_step/dense_fused",
    )


register(
    _row(torch.bfloat16, "fused", False),
    _row(torch.bfloat16, "foreach", False),
    _row(torch.bfloat16, "foreach", True),
    _row(torch.bfloat16, "fused", True),
    _row(torch.float16, "fused", False),
    _row(torch.float16, "fused", True),
)
