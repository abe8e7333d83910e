"""The optimizer step: SGD with momentum and weight decay, dense, masked as published, compiled."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bench.published import STEP_BYTES, PublishedMasking
from bench.registry import Case, Setting, Yardstick, register
from bench.resnet50 import is_weight, kaiming_weights, parameter_shapes, weight_shapes

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 1e-4
SPARSITY = 0.9
TINY_COUNTS = (1, 54, 1000)
TINY_NUMEL = 256

Which = Literal["weights", "all"]
Loop = Literal["fused", "foreach", "single"]

# Numbers read and written, of weight, gradient, momentum. One pass:
FUSED_ACCESSES = 3 + 2
# A call each: grad + decay * weight, momentum * mu, momentum + grad, weight - lr * momentum.
UNFUSED_ACCESSES = 3 + 2 + 3 + 3
ACCESSES: dict[Loop, int] = {
    "fused": FUSED_ACCESSES,
    "foreach": UNFUSED_ACCESSES,
    "single": UNFUSED_ACCESSES,
}
# fp32 bytes a weight.
FUSED = 4 * FUSED_ACCESSES
# Two calls, weight * mask and momentum * mask, each reading two tensors and writing a third.
MASKING = sum(STEP_BYTES.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensors:
    """A network's tensors between backward and step; masked ones obey their mask."""

    params: list[nn.Parameter]
    weights: list[nn.Parameter]
    """Those of `params` that have a mask."""
    masks: list[Tensor]
    """bool, one a weight."""

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(param.numel() for param in self.params)

    @property
    def masked_numel(self) -> int:
        """Elements under a mask."""
        return sum(weight.numel() for weight in self.weights)


def make_tensors(which: Which, sparsity: float, setting: Setting) -> Tensors:
    """Kaiming weights under uniform random masks, with gradients, for weights or all parameters."""
    size = setting.size
    shapes = weight_shapes(size) if which == "weights" else parameter_shapes(size)
    generator = torch.Generator(setting.device).manual_seed(setting.seed + 1)
    params, weights, masks = [], [], []
    for tensor in kaiming_weights(shapes, setting.device, setting.seed):
        param = nn.Parameter(tensor)
        grad = torch.randn(tensor.shape, device=setting.device, generator=generator)
        param.grad = grad * 1e-3
        params.append(param)
        if is_weight(tensor.shape):
            mask = torch.rand(tensor.shape, device=setting.device, generator=generator) >= sparsity
            param.data.masked_fill_(~mask, 0.0)
            weights.append(param)
            masks.append(mask)
    return Tensors(params=params, weights=weights, masks=masks)


def make_sgd(params: list[nn.Parameter], loop: Loop) -> torch.optim.SGD:
    """torch.optim.SGD in one of its three implementations."""
    return torch.optim.SGD(
        params,
        lr=LEARNING_RATE,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        fused=loop == "fused",
        foreach=loop == "foreach",
    )


def dense_case(params: list[nn.Parameter], loop: Loop) -> Case:
    """The dense step of parameters that have gradients."""
    per_weight = ACCESSES[loop] * params[0].element_size()
    numel = sum(param.numel() for param in params)
    return Case(
        run=make_sgd(params, loop).step,
        n_tensors=len(params),
        n_weights=numel,
        model_bytes=per_weight * numel,
        account=f"sgd {per_weight}",
    )


def build_sgd(which: Which, loop: Loop, dtype: torch.dtype, setting: Setting) -> Case:
    """Of the network's weights, or of all its parameters."""
    params = []
    for param in make_tensors(which, 0.0, setting).params:
        params.append(nn.Parameter(param.detach().to(dtype)))
        params[-1].grad = torch.randn_like(params[-1]) * 1e-3
    return dense_case(params, loop)


def tiny_weights(count: int, setting: Setting) -> list[Tensor]:
    """So few numbers in `count` tensors that launching is what takes time."""
    generator = torch.Generator(setting.device).manual_seed(setting.seed)
    many = torch.randn(count, TINY_NUMEL, device=setting.device, generator=generator)
    return [weight.clone() for weight in many]


def build_tiny(count: int, loop: Loop, setting: Setting) -> Case:
    """The dense step of `tiny_weights`."""
    params = [nn.Parameter(weight) for weight in tiny_weights(count, setting)]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    return dense_case(params, loop)


def build_published(which: Which, loop: Loop, setting: Setting) -> Case:
    """The dense step, then the published masking."""
    tensors = make_tensors(which, SPARSITY, setting)
    optimizer = make_sgd(tensors.params, loop)
    masking = PublishedMasking(tensors.weights, optimizer, tensors.masks)

    def run() -> None:
        optimizer.step()
        masking.apply_masks()

    return Case(
        run=run,
        n_tensors=len(tensors.params),
        n_weights=tensors.numel,
        model_bytes=4 * ACCESSES[loop] * tensors.numel + MASKING * tensors.masked_numel,
        account=f"sgd {4 * ACCESSES[loop]} + masks {MASKING}",
    )


def masked_step(
    weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor], masks: list[Tensor]
) -> None:
    """SGD and both mask products over lists: what a compiler is given to fuse."""
    direction = torch._foreach_add(grads, weights, alpha=WEIGHT_DECAY)
    torch._foreach_mul_(momenta, MOMENTUM)
    torch._foreach_add_(momenta, direction)
    torch._foreach_mul_(momenta, masks)
    torch._foreach_add_(weights, momenta, alpha=-LEARNING_RATE)
    torch._foreach_mul_(weights, masks)


def build_compiled(mask_dtype: torch.dtype, setting: Setting) -> Case:
    """`torch.compile` of `masked_step`: the strongest thing to write without a kernel."""
    tensors = make_tensors("weights", SPARSITY, setting)
    weights = [weight.detach() for weight in tensors.weights]
    grads = [weight.grad for weight in tensors.weights if weight.grad is not None]
    momenta = [torch.zeros_like(weight) for weight in weights]
    masks = [mask.to(mask_dtype) for mask in tensors.masks]
    compiled = torch.compile(masked_step, fullgraph=True, dynamic=False)
    per_weight = FUSED + mask_dtype.itemsize
    return Case(
        run=lambda: compiled(weights, grads, momenta, masks),
        n_tensors=len(weights),
        n_weights=tensors.numel,
        model_bytes=per_weight * tensors.numel,
        account=f"sgd {FUSED} + mask {mask_dtype.itemsize}",
    )


def _rows() -> list[Yardstick]:
    rows = []
    which: Which
    for which in ("weights", "all"):
        baseline = f"sgd_{which}/torch_fused"
        dense: tuple[Loop, ...] = ("fused", "foreach", "single")
        for loop in dense:
            rows.append(
                Yardstick(
                    group="step",
                    name=f"sgd_{which}",
                    variant=f"torch_{loop}",
                    build=functools.partial(build_sgd, which, loop, torch.float32),
                    baseline=baseline,
                    graph=True,
                )
            )
        masked: tuple[Loop, ...] = ("fused", "foreach")
        for loop in masked:
            rows.append(
                Yardstick(
                    group="step",
                    name=f"sgd_{which}",
                    variant=f"published_{loop}",
                    build=functools.partial(build_published, which, loop),
                    sparsity=SPARSITY,
                    baseline=baseline,
                )
            )
    rows += [
        Yardstick(
            group="step",
            name="sgd_weights",
            variant="torch_fused",
            build=functools.partial(build_sgd, "weights", "fused", dtype),
            dtype=str(dtype).removeprefix("torch."),
            baseline="sgd_weights/torch_fused",
            graph=True,
        )
        for dtype in (torch.bfloat16, torch.float16)
    ]
    loops: tuple[Loop, ...] = ("fused", "foreach")
    rows += [
        Yardstick(
            group="step",
            name=f"sgd_tiny_{count}",
            variant=f"torch_{loop}",
            build=functools.partial(build_tiny, count, loop),
            baseline=f"sgd_tiny_{count}/torch_fused",
            graph=True,
        )
        for count in TINY_COUNTS
        for loop in loops
    ]
    # Compiling takes long enough to have its own process and time limit, with its own baseline.
    rows.append(
        Yardstick(
            group="compiled",
            name="sgd_weights",
            variant="torch_fused",
            build=functools.partial(build_sgd, "weights", "fused", torch.float32),
            baseline="sgd_weights/torch_fused",
            graph=True,
        )
    )
    for label, dtype in (("float", torch.float32), ("bool", torch.bool)):
        rows.append(
            Yardstick(
                group="compiled",
                name="sgd_weights",
                variant=f"compiled_{label}_mask",
                build=functools.partial(build_compiled, dtype),
                sparsity=SPARSITY,
                baseline="sgd_weights/torch_fused",
                graph=True,
            )
        )
    return rows


register(*_rows())
