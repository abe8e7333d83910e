"""Inputs for :mod:`granet_kernels.selftest`: awkward sizes, ties, NaN, odd layouts.

A generator yields ``(label, args, kwargs, roundings)``. Everything is drawn from a generator of its
own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from granet_kernels.backends.reference import pack_mask, unpack_mask
from granet_kernels.layout import full_mask, packed_length

Inputs = tuple[str, tuple[Any, ...], dict[str, Any], int]

SIZES = (0, 1, 7, 8, 9, 31, 33, 127, 128, 129, 1009)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
}
"""Without gaps, as weights are."""
VALUES: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "normal": lambda n, g: torch.randn(n, generator=g),
    "ties": lambda n, g: torch.randint(-2, 3, (n,), generator=g) * 0.5,
    "equal": lambda n, g: torch.full((n,), -0.25),
    "zeros": lambda n, g: torch.where(torch.rand(n, generator=g) < 0.5, -0.0, 0.0),
    "tiny": lambda n, g: torch.randn(n, generator=g) * 1e-40,
    "special": lambda n, g: _special(n, g),
}


def _special(n: int, g: torch.Generator) -> Tensor:
    """A third NaN of either sign, infinities, and ordinary numbers."""
    pool = torch.tensor([float("nan"), -float("nan"), float("inf"), -float("inf"), 0.0, -1.0])
    values = torch.randn(n, generator=g)
    pick = torch.randint(0, 9, (n,), generator=g)
    return torch.where(pick < 6, pool[pick.clamp(max=5)], values)


def random_mask(numel: int, g: torch.Generator, sparsity: float = 0.5) -> Tensor:
    return pack_mask(torch.rand(numel, generator=g) >= sparsity)


def weight(numel: int, dtype: torch.dtype, values: str, layout: str, g: torch.Generator) -> Tensor:
    flat = VALUES[values](numel, g).to(dtype)
    if layout == "contiguous":
        return flat.clone()
    return LAYOUTS[layout](flat.view(4, -1, 3, 3))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pack_mask_cases() -> Iterator[Inputs]:
    g = generator()
    for numel in SIZES:
        yield f"{numel}", (torch.rand(numel, generator=g) < 0.5,), {}, 0


def unpack_mask_cases() -> Iterator[Inputs]:
    g = generator()
    for numel in SIZES:
        yield f"{numel}", (random_mask(numel, g), numel), {}, 0


def count_active_cases() -> Iterator[Inputs]:
    g = generator()
    yield "sizes", ([random_mask(numel, g) for numel in SIZES],), {}, 0
    yield (
        "full-and-empty",
        ([full_mask(1009), torch.zeros(packed_length(33), dtype=torch.uint8)],),
        {},
        0,
    )


def zero_inactive_cases() -> Iterator[Inputs]:
    g = generator()
    for dtype in DTYPES:
        tensors = [weight(numel, dtype, "special", "contiguous", g) for numel in SIZES]
        yield f"{dtype}-sizes", (tensors, [random_mask(t.numel(), g) for t in tensors]), {}, 0
    for layout in LAYOUTS:
        tensor = weight(360, torch.float32, "special", layout, g)
        yield layout, ([tensor], [random_mask(360, g)]), {}, 0
    tensor = weight(1009, torch.float32, "special", "contiguous", g)
    yield "nothing-active", ([tensor], [torch.zeros(packed_length(1009), dtype=torch.uint8)]), {}, 0
    yield "all-active", ([tensor], [full_mask(1009)]), {}, 0
    whole = torch.randn(2 * 128 + 5, generator=g)  # two weights in one buffer, the second unaligned
    masks = [random_mask(128, g), random_mask(133, g)]
    yield "shared-storage", ([whole[:128].clone(), whole[128:]], masks), {}, 0


def mask_cast_cases() -> Iterator[Inputs]:
    g = generator()
    for numel in SIZES:
        args = (
            weight(numel, torch.float32, "special", "contiguous", g),
            random_mask(numel, g),
            torch.float16,
        )
        yield f"{numel}", args, {}, 0
    for source in DTYPES:
        for target in DTYPES:
            args = (weight(360, source, "normal", "channels_last", g), random_mask(360, g), target)
            yield f"{source}-to-{target}", args, {}, 0


def mask_grad_cases() -> Iterator[Inputs]:
    g = generator()
    for flag in (False, True):
        for layout in LAYOUTS:
            like = weight(360, torch.float32, "normal", layout, g)
            for dtype in (torch.float32, torch.bfloat16):
                values = "special" if dtype == torch.float32 else "normal"
                grad = weight(360, dtype, values, "contiguous", g).view(like.shape)
                args = (grad, like, random_mask(360, g), torch.tensor(flag))
                yield f"{'dense' if flag else 'masked'}-{layout}-{dtype}", args, {}, 0


def masked_sgd_cases() -> Iterator[Inputs]:
    g = generator()
    plain = {
        "lr": 0.1,
        "momentum": 0.0,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "nesterov": False,
        "maximize": False,
        "first": False,
    }
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "momentum": {"momentum": 0.9, "weight_decay": 1e-4},
        "first": {"momentum": 0.9, "first": True},
        "dampening": {"momentum": 0.9, "dampening": 0.3},
        "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
        "maximize": {"momentum": 0.9, "maximize": True},
        "lr-tensor": {"momentum": 0.9, "lr_tensor": torch.tensor(0.05)},
        "grad-scale": {
            "momentum": 0.9,
            "grad_scale": torch.tensor(8.0),
            "found_inf": torch.tensor(0.0),
        },
        "found-inf": {
            "momentum": 0.9,
            "grad_scale": torch.tensor(8.0),
            "found_inf": torch.tensor(1.0),
        },
    }
    for label, options in variants.items():
        for dtype in DTYPES:
            yield f"{label}-{dtype}", *_sgd(dtype, dtype, "contiguous", plain | options, g)
    momentum = plain | variants["momentum"]
    yield "fp32-momentum", *_sgd(torch.bfloat16, torch.float32, "contiguous", momentum, g)
    for layout in LAYOUTS:
        yield layout, *_sgd(torch.float32, torch.float32, layout, momentum, g, sizes=(360, 720))
    yield from averaged_sgd_cases(momentum)


def averaged_sgd_cases(options: dict[str, Any]) -> Iterator[Inputs]:
    """With averages of the weights, in every dtype and layout, for decays on both sides of a half."""
    g = generator(1)
    averaged = options | {"average_decay": 0.9, "weight_decay": 0.0, "lr": 2.0**-6, "momentum": 0.5}
    variants: dict[str, dict[str, Any]] = {
        "": {},
        "-no-momentum": {"momentum": 0.0},
        "-small-decay": {"average_decay": 0.1},
        "-copied": {"average_decay": 0.0},
        "-kept": {"average_decay": 1.0},
        "-found-inf": {"grad_scale": torch.tensor(8.0), "found_inf": torch.tensor(1.0)},
    }
    for label, variant in variants.items():
        for dtype in DTYPES:
            yield f"average{label}-{dtype}", *_averaged(dtype, "contiguous", averaged | variant, g)
    for layout in LAYOUTS:
        case = _averaged(torch.float32, layout, options | {"average_decay": 0.9}, g, (360, 720))
        yield f"average-{layout}", *case


def _averaged(
    dtype: torch.dtype,
    layout: str,
    options: dict[str, Any],
    g: torch.Generator,
    sizes: tuple[int, ...] = SIZES,
) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """Gradients and momenta are multiples of a half.

    So a step is exact in fp32, and every backend rounds the same number to 16 bits: averages, which
    have more, are compared as closely as they are computed.
    """
    args, options, roundings = _sgd(dtype, dtype, layout, options, g, sizes, values="ties")
    wider = torch.promote_types(dtype, torch.float32)
    averages = [weight(param.numel(), wider, "normal", layout, g) for param in args[0]]
    for average, mask in zip(averages, args[3], strict=True):
        if average.numel() == 1009:
            average[~unpack_mask(mask, 1009)] = float("nan")
    return args, options | {"averages": averages}, roundings


def _sgd(
    dtype: torch.dtype,
    momentum_dtype: torch.dtype,
    layout: str,
    options: dict[str, Any],
    g: torch.Generator,
    sizes: tuple[int, ...] = SIZES,
    values: str = "normal",
) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    params = [weight(numel, dtype, "normal", layout, g) for numel in sizes]
    grads = [weight(p.numel(), dtype, values, "contiguous", g).view(p.shape) for p in params]
    momenta = [weight(p.numel(), momentum_dtype, values, layout, g) for p in params]
    masks = [random_mask(p.numel(), g, sparsity=0.8) for p in params]
    for grad, param, mask in zip(grads, params, masks, strict=True):
        if param.numel() == 1009:  # what is inactive must not leak
            inactive = ~unpack_mask(mask, 1009)
            grad[inactive] = float("nan")
    return (params, grads, momenta if options["momentum"] else [], masks), options, 8


def prune_cases() -> Iterator[Inputs]:
    g = generator()
    for values in VALUES:
        for dtype in DTYPES[:3]:
            tensors = [weight(numel, dtype, values, "contiguous", g) for numel in SIZES]
            masks = [random_mask(t.numel(), g, 0.3) for t in tensors]
            momenta = [torch.randn_like(t, dtype=torch.float32) for t in tensors]
            yield f"global-{values}-{dtype}", (tensors, masks, torch.tensor([400]), momenta), {}, 0
            counts = torch.tensor([numel // 3 for numel in SIZES])
            yield f"each-{values}-{dtype}", (tensors, masks, counts, []), {}, 0
    for k in (0, 1, 180, 359, 360, 1000):
        for layout in LAYOUTS:
            tensor = weight(360, torch.float32, "ties", layout, g)
            yield (
                f"{k}-{layout}",
                ([tensor], [random_mask(360, g, 0.1)], torch.tensor([k]), []),
                {},
                0,
            )
    mixed = [weight(129, dtype, "normal", "contiguous", g) for dtype in DTYPES]
    yield "mixed-dtypes", (mixed, [full_mask(129) for _ in mixed], torch.tensor([99]), []), {}, 0


def pruned_masks_cases() -> Iterator[Inputs]:
    for label, (weights, masks, k, _), _, _ in prune_cases():
        yield label, (weights, masks, k), {}, 0


def drop_regrow_cases() -> Iterator[Inputs]:
    g = generator()
    for values in VALUES:
        for dtype in DTYPES[:3]:
            tensors = [weight(numel, dtype, values, "contiguous", g) for numel in SIZES]
            masks = [random_mask(t.numel(), g, 0.6) for t in tensors]
            scores = [weight(t.numel(), dtype, values, "contiguous", g) for t in tensors]
            momenta = [torch.randn_like(t, dtype=torch.float32) for t in tensors]
            yield f"{values}-{dtype}", (tensors, masks, scores, fraction(0.3), momenta), {}, 0
    for p in (0.0, 0.005, 0.1, 0.5, 1.0):
        for layout in LAYOUTS:
            tensor = weight(360, torch.float32, "ties", layout, g)
            scores = [torch.randn(360, generator=g).view(tensor.shape)]
            yield f"{p}-{layout}", ([tensor], [random_mask(360, g)], scores, fraction(p), []), {}, 0
    expanded = torch.tensor(0.5).expand(1009)
    one = weight(1009, torch.float32, "normal", "contiguous", g)
    yield "expanded-scores", ([one], [random_mask(1009, g)], [expanded], fraction(0.3), []), {}, 0


def prune_drop_regrow_cases() -> Iterator[Inputs]:
    """What is pruned, then exchanged: all drop fractions and kinds of scores in turn."""
    g = generator()
    fractions, kinds = (0.3, 0.0, 1e-9, 0.5, 1.0), tuple(VALUES)
    for i, (label, (weights, masks, k, momenta), _, _) in enumerate(prune_cases()):
        p, kind = fractions[i % len(fractions)], kinds[i % len(kinds)]
        scores = [VALUES[kind](t.numel(), g).view(t.shape) for t in weights]
        yield f"{label}-{p}-{kind}", (weights, masks, scores, k, fraction(p), momenta), {}, 0


def fraction(p: float) -> Tensor:
    return torch.tensor(p, dtype=torch.float64)


def topk_mask_cases() -> Iterator[Inputs]:
    g = generator()
    for values in VALUES:
        for dtype in DTYPES[:3]:
            scores = [weight(numel, dtype, values, "contiguous", g) for numel in SIZES]
            yield f"global-{values}-{dtype}", (scores, torch.tensor([500])), {}, 0
            yield f"each-{values}-{dtype}", (scores, torch.tensor([n // 2 for n in SIZES])), {}, 0


GENERATORS: dict[str, Callable[[], Iterator[Inputs]]] = {
    "pack_mask": pack_mask_cases,
    "unpack_mask": unpack_mask_cases,
    "count_active": count_active_cases,
    "zero_inactive_": zero_inactive_cases,
    "mask_cast": mask_cast_cases,
    "mask_grad": mask_grad_cases,
    "masked_sgd_": masked_sgd_cases,
    "prune_": prune_cases,
    "pruned_masks": pruned_masks_cases,
    "drop_regrow_": drop_regrow_cases,
    "prune_drop_regrow_": prune_drop_regrow_cases,
    "topk_mask": topk_mask_cases,
}
