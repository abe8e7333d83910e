"""`granet inspect`: what is in a checkpoint, and whether it is in order.

Several checkpoints are compared as those of ranks of one training: their masks must be the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from granet.commands.tables import show
from granet.distributions import DISTRIBUTIONS, layer_budgets
from granet.training.checkpoint import Checkpoint, load_checkpoint
from granet.training.runs import MASK_SUFFIX
from granet.training.telemetry import LAST
from granet_kernels import unpack_mask


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerFindings:
    """One masked layer in a checkpoint."""

    layer: str
    shape: tuple[int, ...]
    active: int
    """Weights whose mask bit is set."""
    zero: int
    """Weights that are 0."""
    revived: int
    """Inactive weights that are not 0."""
    negative_zero: int
    """Inactive weights that are -0.0, where +0.0 is kept."""
    not_finite: int
    """Weights that are NaN or infinite."""
    dead_channels: int
    """Output channels without an active weight."""

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def sparsity(self) -> float:
        return 1 - self.active / self.numel


def layers_in(state: Mapping[str, Tensor]) -> list[LayerFindings]:
    """The masked layers of a model's state_dict."""
    return [
        _findings(key.removesuffix(MASK_SUFFIX), state)
        for key in state
        if key.endswith(MASK_SUFFIX)
    ]


def _findings(prefix: str, state: Mapping[str, Tensor]) -> LayerFindings:
    weight = state[f"{prefix}weight"]
    mask = unpack_mask(state[prefix + MASK_SUFFIX], weight.shape)
    inactive = weight[~mask]
    return LayerFindings(
        layer=prefix.removesuffix("."),
        shape=tuple(weight.shape),
        active=int(mask.sum()),
        zero=int((weight == 0).sum()),
        revived=int((inactive != 0).sum()),
        negative_zero=int(((inactive == 0) & inactive.signbit()).sum()),
        not_finite=int((~torch.isfinite(weight)).sum()),
        dead_channels=int((~mask.flatten(1).any(1)).sum()),
    )


def problems_of(checkpoint: Checkpoint, layers: Sequence[LayerFindings]) -> list[str]:
    """What is not as it should be, a sentence each."""
    found = _layer_problems(layers)
    if checkpoint.entries["average"] is not None:
        averaged = _layer_problems(layers_in(checkpoint.network))
        found += [f"average of the weights: {problem}" for problem in averaged]
    found += _stale_states(checkpoint, layers)
    found += _sparsifier_problems(checkpoint, layers)
    return found


def _layer_problems(layers: Sequence[LayerFindings]) -> list[str]:
    found = []
    for layer in layers:
        name = layer.layer or "the model"
        if layer.revived:
            found.append(f"{name}: {layer.revived:,} inactive weights are not zero")
        if layer.negative_zero:
            found.append(f"{name}: {layer.negative_zero:,} inactive weights are -0.0")
        if layer.not_finite:
            found.append(f"{name}: {layer.not_finite:,} weights are NaN or infinite")
        if layer.active == 0:
            found.append(f"{name}: no weight is active")
        elif layer.dead_channels:
            channels = layer.shape[0]
            found.append(
                f"{name}: {layer.dead_channels:,} of {channels:,} output channels are dead"
            )
    return found


def _stale_states(checkpoint: Checkpoint, layers: Sequence[LayerFindings]) -> list[str]:
    """Optimizer states that are not zero where weights are inactive."""
    state = checkpoint.entries["model"]
    if not layers:
        return []
    found = []
    parameters = [key for key in state if not key.endswith(MASK_SUFFIX) and _is_parameter(key)]
    groups = checkpoint.entries["optimizer"]["param_groups"]
    if sum(len(group["params"]) for group in groups) != len(parameters):
        return []  # tied weights: which state is whose cannot be told from names
    for index, entries in checkpoint.entries["optimizer"]["state"].items():
        if not parameters[index].endswith("weight"):
            continue
        prefix = parameters[index].removesuffix("weight")
        packed = state.get(prefix + MASK_SUFFIX)
        if packed is None:
            continue
        inactive = ~unpack_mask(packed, state[parameters[index]].shape)
        for name, value in entries.items():
            is_state = isinstance(value, Tensor) and value.shape == inactive.shape
            if is_state and (stale := int((value[inactive] != 0).sum())):
                layer = prefix.removesuffix(".") or "the model"
                found.append(f"{layer}: {name} is not zero for {stale:,} inactive weights")
    return found


def _key(layer: str, name: str) -> str:
    return f"{layer}.{name}".removeprefix(".")


def _is_parameter(key: str) -> bool:
    """By the names of buffers in the layers that torch has."""
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return not key.endswith(buffers)


def _sparsifier_problems(checkpoint: Checkpoint, layers: Sequence[LayerFindings]) -> list[str]:
    """Masks of the model beside those of the sparsifier, and budgets beside the distribution's."""
    saved: dict[str, Any] | None = checkpoint.entries["sparsifier"]
    if saved is None:
        return []
    found = []
    model = checkpoint.entries["model"]
    for name, mask in saved["masks"].items():
        own = model.get(_key(name, MASK_SUFFIX))
        if own is None or not torch.equal(own, mask):
            found.append(f"{name}: the sparsifier's mask is not the model's")
    config = checkpoint.config
    fixed = config.method in ("rigl", "rigl-itop", "set", "static")
    rule = config.distribution or {"set": "er"}.get(config.method, "erk")
    plain = rule in DISTRIBUTIONS and config.erk_power is None and config.redistribution is None
    if fixed and plain and not config.official_rounding:
        floor = 1 if config.floor is None else config.floor
        budgets = layer_budgets([x.shape for x in layers], config.sparsity, rule, floor=floor)
        for layer, budget in zip(layers, budgets, strict=True):
            if layer.active != budget:
                found.append(
                    f"{layer.layer}: {layer.active:,} weights are active, {rule} gives it {budget:,}"
                )
    return found


def drift(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Layers whose masks differ between checkpoints."""
    first = checkpoints[0]
    found = []
    for other in checkpoints[1:]:
        names = {
            key for c in (first, other) for key in c.entries["model"] if key.endswith(MASK_SUFFIX)
        }
        for key in sorted(names):
            ours, theirs = first.entries["model"].get(key), other.entries["model"].get(key)
            if ours is None or theirs is None or not torch.equal(ours, theirs):
                layer = key.removesuffix(MASK_SUFFIX).removesuffix(".")
                found.append(f"{layer}: masks of {first.path} and {other.path} differ")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "checkpoints", nargs="+", type=Path, metavar="PATH", help="checkpoint, or run directory"
    )


def run(args: argparse.Namespace) -> int:
    """Print what is in them, and what is wrong; 1 if anything is."""
    paths = [path / LAST if path.is_dir() else path for path in args.checkpoints]
    checkpoints = [load_checkpoint(path) for path in paths]
    problems = []
    for checkpoint in checkpoints:
        layers = layers_in(checkpoint.entries["model"])
        print("\n".join(_facts(checkpoint, layers)))
        if layers:
            header = ["layer", "shape", "weights", "active", "sparsity", "zero", "dead channels"]
            show(header, [_row(layer) for layer in layers])
        problems += problems_of(checkpoint, layers)
    problems += drift(checkpoints)
    print("\n".join(f"PROBLEM {problem}" for problem in problems) or "In order.")
    return 1 if problems else 0


def _facts(checkpoint: Checkpoint, layers: Sequence[LayerFindings]) -> list[str]:
    config, progress = checkpoint.config, checkpoint.entries["progress"]
    size = checkpoint.path.stat().st_size
    lines = [
        f"{checkpoint.path}: {size:,} bytes",
        f"{config.method} {config.model} on {config.dataset}, seed {config.seed}: step "
        f"{progress['step']:,} of {progress['total_steps']:,}, {progress['epoch']} epochs",
    ]
    if layers:
        numel, active = sum(x.numel for x in layers), sum(x.active for x in layers)
        lines.append(f"{active:,} of {numel:,} weights active, sparsity {1 - active / numel:.4f}")
    return lines


def _row(layer: LayerFindings) -> list[str]:
    return [
        layer.layer or "(the model)",
        "x".join(map(str, layer.shape)),
        f"{layer.numel:,}",
        f"{layer.active:,}",
        f"{layer.sparsity:.4f}",
        f"{layer.zero:,}",
        f"{layer.dead_channels:,} of {layer.shape[0]:,}",
    ]
