"""What an update did to each layer, as rows for a table, a log, or whatever is called with them."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from granet.engine import MaskChange, Sparsifier
from granet_kernels import BitMask, count_active

log = logging.getLogger("granet")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerChange:
    """One layer in one update. Counts are of weights, unless they say otherwise."""

    step: int
    """Optimizer steps so far."""
    layer: str
    """Its name in the model."""
    numel: int
    """All of its weights."""
    active: int
    """After the update."""
    sparsity: float
    """Share of inactive weights after the update."""
    pruned: int
    """Deactivated to lower the number of active weights."""
    dropped: int
    """Deactivated to make room; those that the same update regrew are not counted."""
    regrown: int
    """Activated."""
    churn: float
    """Share of the active weights that had not been active before."""
    explored: float
    """Share of all weights that have been active at some time (the ITOP rate, Liu et al., 2021)."""
    survival: float | None
    """Share of what the update before regrew that is active still; None where it regrew nothing."""
    dead_channels: int
    """Output channels without an active weight."""
    channels: int
    """Output channels."""


Sink = Callable[[Sequence[LayerChange]], object]
"""Called with the layers of one update."""

COUNTS = (
    "active",
    "pruned",
    "dropped",
    "regrown",
    "explored",
    "were_regrown",
    "survivors",
    "alive",
)


class TopologyMonitor:
    """Watches a sparsifier's updates.

    What it counts is copied to the host behind the device's back and read at the next update, or by
    :meth:`flush`: no step waits for it. With several processes the first one reports.

    A layer whose output channels are dead but for a tenth is warned of, once.
    """

    collapsed_from = 0.9
    """Share of dead output channels."""

    def __init__(self, sparsifier: Sparsifier, *sinks: Sink) -> None:
        self.sinks = list(sinks)
        self._layers = sparsifier.layers
        self._explored = {name: _copy(layer.bitmask) for name, layer in self._layers.items()}
        self._regrown = {
            name: dataclasses.replace(mask, packed=torch.zeros_like(mask.packed))
            for name, mask in self._explored.items()
        }
        self._pending: tuple[int, Tensor, torch.Event | None] | None = None
        self._collapsed: set[str] = set()
        sparsifier.observers.append(self)

    def __call__(self, change: MaskChange) -> None:
        """Count, and report the update before."""
        self.flush()
        counted = [
            self._count(name, change.before[name], change.pruned[name], after)
            for name, after in change.after.items()
        ]
        self._pending = (change.step, *_to_host(torch.stack(counted)))

    def flush(self) -> None:
        """Report what has been counted and not been reported yet. Waits for it."""
        if self._pending is None:
            return
        step, counts, copied = self._pending
        self._pending = None
        if copied is not None:
            copied.synchronize()
        rows = [
            self._row(step, name, dict(zip(COUNTS, values, strict=True)))
            for name, values in zip(self._layers, counts.tolist(), strict=True)
        ]
        self._warn_of_collapse(rows)
        if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
            return
        errors = []
        for sink in self.sinks:
            try:
                sink(rows)
            except Exception as error:  # the others get their rows all the same
                errors.append(error)
        if errors:
            raise errors[0]

    def state_dict(self) -> dict[str, Any]:
        """What has been explored, and what grew last; in row-major order. Reports first."""
        self.flush()
        return {
            name: {layer: mask.canonical().clone() for layer, mask in masks.items()}
            for name, masks in (("explored", self._explored), ("regrown", self._regrown))
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            ValueError: it is of other layers. Nothing has been changed then.
        """
        loaded = []
        for name in ("explored", "regrown"):
            if list(state[name]) != list(self._layers):
                raise ValueError(
                    f"state: expected {name} of {', '.join(self._layers)}, got {', '.join(state[name])}"
                )
            loaded.append(
                {
                    layer: _copy(BitMask.from_canonical(mask, self._layers[layer].weight.shape))
                    for layer, mask in state[name].items()
                }
            )
        self._pending = None
        self._explored, self._regrown = loaded

    def _count(self, name: str, before: Tensor, pruned: Tensor, after: Tensor) -> Tensor:
        explored = self._as_now(name, self._explored[name])
        explored |= after
        were_regrown = self._as_now(name, self._regrown[name])
        regrown = after & ~pruned
        counts = count_active(
            [
                after,
                before & ~pruned,
                pruned & ~after,
                regrown,
                explored,
                were_regrown,
                were_regrown & after,
            ]
        )
        self._explored[name] = self._as_mask(name, explored)
        self._regrown[name] = self._as_mask(name, regrown)
        alive = self._as_mask(name, after).to_bool().flatten(1).any(1).sum()
        return torch.cat([counts, alive.view(1)])

    def _as_now(self, name: str, mask: BitMask) -> Tensor:
        """Packed as the layer's mask is by now, which may have moved or changed its memory format."""
        now = self._layers[name].bitmask
        moved = dataclasses.replace(mask, packed=mask.packed.to(now.packed.device))
        return moved.in_order_of(self._layers[name].weight).packed

    def _as_mask(self, name: str, packed: Tensor) -> BitMask:
        return dataclasses.replace(self._layers[name].bitmask, packed=packed)

    def _row(self, step: int, name: str, counts: Mapping[str, int]) -> LayerChange:
        weight = self._layers[name].weight
        numel, channels = weight.numel(), weight.shape[0]
        return LayerChange(
            step=step,
            layer=name,
            numel=numel,
            active=counts["active"],
            sparsity=1 - counts["active"] / numel,
            pruned=counts["pruned"],
            dropped=counts["dropped"],
            regrown=counts["regrown"],
            churn=counts["regrown"] / max(counts["active"], 1),
            explored=counts["explored"] / numel,
            survival=counts["survivors"] / counts["were_regrown"]
            if counts["were_regrown"]
            else None,
            dead_channels=channels - counts["alive"],
            channels=channels,
        )

    def _warn_of_collapse(self, rows: Sequence[LayerChange]) -> None:
        for row in rows:
            dead = row.dead_channels >= self.collapsed_from * row.channels
            if dead and row.layer not in self._collapsed:
                self._collapsed.add(row.layer)
                log.warning(
                    "step %d: %s has collapsed: %d of %d output channels are dead, %d of %d weights active",
                    row.step,
                    row.layer,
                    row.dead_channels,
                    row.channels,
                    row.active,
                    row.numel,
                )


class Csv:
    """A sink that appends a row for each layer to a CSV file, after a header in a new one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, rows: Sequence[LayerChange]) -> None:
        is_new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(LayerChange)])
            if is_new:
                writer.writeheader()
            writer.writerows(map(dataclasses.asdict, rows))


class JsonLines:
    """A sink that appends a line of JSON for each layer to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, rows: Sequence[LayerChange]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)


class Scalars:
    """A sink that writes to a TensorBoard ``SummaryWriter``, or what has its ``add_scalar``."""

    names = ("sparsity", "churn", "explored", "survival", "dead_channels")

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def __call__(self, rows: Sequence[LayerChange]) -> None:
        for row in rows:
            for name in self.names:
                value = getattr(row, name)
                if value is not None:
                    self.writer.add_scalar(f"topology/{name}/{row.layer}", value, row.step)


def _copy(mask: BitMask) -> BitMask:
    return dataclasses.replace(mask, packed=mask.packed.clone())


def _to_host(tensor: Tensor) -> tuple[Tensor, torch.Event | None]:
    """A copy on the host, and the event after which it is there; None where it is there already."""
    if tensor.device.type == "cpu":
        return tensor, None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    copied = torch.Event(tensor.device)
    copied.record()
    return copy, copied
