"""`granet plan`: what a run would be, layer by layer, before a step of it is taken.

It makes the network, the optimizer and the sparsifier as `granet train` does, so a target that cannot
be reached, or a schedule that would never prune, is an error here as there.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from granet.commands.flags import add_config_flags, add_flags, settings_given
from granet.commands.tables import show
from granet.distributions import active_budget
from granet.training.config import TrainConfig, build_config

# What the data sets are, for plans made where their files are not: training images, classes, shape.
FACTS: dict[str, tuple[int, int, tuple[int, int, int]]] = {
    "digits": (1437, 10, (1, 8, 8)),
    "fashion-mnist": (60_000, 10, (1, 28, 28)),
    "cifar10": (50_000, 10, (3, 32, 32)),
    "cifar100": (50_000, 100, (3, 32, 32)),
    "imagefolder": (1_281_167, 1000, (3, 224, 224)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPlan:
    """One layer. FLOPs are of one image's forward pass."""

    layer: str
    shape: tuple[int, ...]
    weights: int
    active_at_start: int
    active_at_end: int | None
    """None where training will decide: magnitudes, or redistribution."""
    dense_flops: int
    mask_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A run."""

    layers: tuple[LayerPlan, ...]
    total_steps: int
    updates: tuple[int, ...]
    """Steps at which masks change."""
    sparsities: tuple[float, ...]
    """After each of them."""
    target_active: int
    optimizer_bytes: int
    model_bytes: int
    """Of parameters and buffers, masks included."""


def make_plan(config: TrainConfig) -> Plan:
    """The plan of a configuration that is not dense.

    Raises:
        ValueError: the run is dense, or impossible.
    """
    from granet.dynamic import DynamicSparsifier
    from granet.flops import measure
    from granet.models import create_model
    from granet.training import build  # needs the train extra
    from granet_kernels import sparsify

    if config.method == "dense":
        raise ValueError("method: expected a sparse one, got 'dense'")
    images, classes, shape = FACTS[config.dataset]
    if config.dataset == "imagefolder":
        shape = (3, config.image_size, config.image_size)
    batches = int(images * (1 - config.val_split)) // config.batch_size
    total_steps = config.epochs * build.usable_batches(config, batches) // config.grad_accum_steps
    torch.manual_seed(config.seed)
    model = sparsify(create_model(config.model, num_classes=classes, in_channels=shape[0]))
    optimizer = build.build_optimizer(config, model)
    sparsifier = build.build_sparsifier(config, model, optimizer, total_steps)
    assert sparsifier is not None
    active = sparsifier.active_counts()
    final: Sequence[int | None] = [None] * len(active)
    # Where updates move weights between layers, no one knows beforehand.
    if isinstance(sparsifier, DynamicSparsifier) and config.redistribution in (None, "none"):
        if sparsifier.plan.ramp is None:
            final = active
        elif sparsifier.plan.scope == "layer":
            counts = sparsifier.counts.after_prune(sparsifier.plan.sparsity, active)
            final = counts if isinstance(counts, list) else final
    flops = measure(model, shape)
    updates = [step for step in range(total_steps + 1) if sparsifier.clock.is_update(step)]
    states = {"sgd": config.momentum > 0, "adamw": 2}[config.opt]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tensors = [*model.parameters(), *model.buffers()]
    return Plan(
        layers=tuple(
            LayerPlan(
                layer=name,
                shape=tuple(layer.weight.shape),
                weights=layer.weight.numel(),
                active_at_start=at_start,
                active_at_end=at_end,
                dense_flops=flops[name],
                mask_bytes=layer.packed_mask.numel(),
            )
            for (name, layer), at_start, at_end in zip(
                sparsifier.layers.items(), active, final, strict=True
            )
        ),
        total_steps=total_steps,
        updates=tuple(updates),
        sparsities=tuple(map(sparsifier.sparsity_at, updates)),
        target_active=active_budget(config.sparsity, sparsifier.numel),
        optimizer_bytes=4 * parameters * int(states),
        model_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `granet train` that say what a run is."""
    parser.usage = "granet plan [-c NAME] [SETTINGS] [KEY=VALUE ...]"
    add_config_flags(parser)
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan; the exit status."""
    config = build_config(settings_given(args))
    plan = make_plan(config)
    header = [
        "layer",
        "shape",
        "weights",
        "at the start",
        "at the end",
        "MFLOPs dense",
        "mask bytes",
    ]
    show(header, [_row(layer) for layer in plan.layers])
    print("\n".join(summary(config, plan)))
    return 0


def _row(layer: LayerPlan) -> list[str]:
    return [
        layer.layer or "(the model)",
        "x".join(map(str, layer.shape)),
        f"{layer.weights:,}",
        _share(layer.active_at_start, layer.weights),
        "by magnitude"
        if layer.active_at_end is None
        else _share(layer.active_at_end, layer.weights),
        f"{layer.dense_flops / 1e6:.2f}",
        f"{layer.mask_bytes:,}",
    ]


def _share(active: int, weights: int) -> str:
    return f"{active:,} ({active / weights:.1%})"


def summary(config: TrainConfig, plan: Plan) -> list[str]:
    """Totals, the schedule, and what may be meant otherwise."""

    def total(name: str) -> int:
        return sum(getattr(layer, name) for layer in plan.layers)

    weights, dense = total("weights"), total("dense_flops")
    start = math.fsum(x.dense_flops * x.active_at_start / x.weights for x in plan.layers)
    lines = [
        f"{config.method}: {weights:,} weights, {total('active_at_start'):,} active at the start, "
        f"{plan.target_active:,} at the end ({config.sparsity:.2%} sparse)",
        f"forward FLOPs of an image: {dense / 1e6:,.1f} M dense, {start / 1e6:,.1f} M at the start",
        f"bytes: model {plan.model_bytes:,} (masks {total('mask_bytes'):,}), optimizer "
        f"{plan.optimizer_bytes:,}; a checkpoint holds both",
        f"{plan.total_steps:,} steps",
    ]
    if plan.updates:
        lines[-1] += (
            f", {len(plan.updates)} updates, from step {plan.updates[0]:,} to {plan.updates[-1]:,}"
        )
        quarters = [plan.updates[(len(plan.updates) - 1) * i // 4] for i in range(5)]
        ramp = dict(zip(plan.updates, plan.sparsities, strict=True))
        lines.append(
            "sparsity "
            + ", ".join(f"{ramp[step]:.4f} at {step:,}" for step in dict.fromkeys(quarters))
        )
    thin = [x.layer for x in plan.layers if x.active_at_start < x.shape[0]]
    if thin:
        lines.append(
            f"WARNING: fewer active weights than output channels at the start: {', '.join(thin)}"
        )
    if plan.updates and config.method in ("granet", "gmp") and len(plan.updates) < 10:
        lines.append(
            f"WARNING: only {len(plan.updates)} updates; pruning is gradual with some dozens (update_freq)"
        )
    return lines
