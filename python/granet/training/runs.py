"""Run directories, read: results, weights counted in checkpoints, and which runs belong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from granet.training.checkpoint import load_checkpoint
from granet.training.config import MACHINE_FIELDS, SPARSE_FIELDS, TrainConfig, field_schemas
from granet.training.telemetry import LAST, SUMMARY, Summary, read_summary
from granet_kernels import unpack_mask

MASK_SUFFIX = "packed_mask"


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightCount:
    """Weights of the convolutions and linear layers in a checkpoint, counted one by one."""

    total: int
    """All of them."""
    zero: int
    """Those that are 0."""
    inactive: int
    """Those whose mask bit is 0; none in a dense run."""

    @property
    def active(self) -> int:
        """Those whose mask bit is 1."""
        return self.total - self.inactive

    @property
    def sparsity(self) -> float:
        """Share of inactive weights; `agreement` says whether as many are 0."""
        return self.inactive / self.total


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """A run directory, read."""

    directory: Path
    """Where it is."""
    checkpoint: Path
    """The checkpoint that the result is about: last.pt of an unfinished run."""
    config: TrainConfig
    """Its configuration, from the checkpoint."""
    processes: int
    """That trained together; each had the batch size to itself."""
    summary: Summary | None
    """Its result; None if it has not finished."""
    counted: WeightCount
    """Weights in the checkpoint."""
    seconds: float
    """Time it took so far."""
    train_flops_ratio: float | None
    """FLOPs of training so far, relative to dense; None before the first step."""


def weights_in(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """The layers of a model's state_dict: name, weight, and mask (bool, its shape).

    Masked layers are those with a mask; without any, the tensors of two dimensions or more called
    weight (convolutions and linear layers, not norms), with None in the mask's place.
    """
    masks = {key.removesuffix(MASK_SUFFIX): key for key in state if key.endswith(MASK_SUFFIX)}
    for key, weight in state.items():
        prefix = key.removesuffix("weight")
        if prefix == key or weight.dim() < 2 or (masks and prefix not in masks):
            continue
        mask = unpack_mask(state[masks[prefix]], weight.shape) if masks else None
        yield prefix.removesuffix("."), weight, mask


def count_weights(state: Mapping[str, Tensor], source: str) -> WeightCount:
    """Count the weights of a model's state_dict: those of `weights_in`.

    Raises:
        ValueError: an inactive weight is not zero; names the layer.
    """
    total = zero = inactive = 0
    for name, weight, mask in weights_in(state):
        total += weight.numel()
        zero += int((weight == 0).sum())
        if mask is not None:
            inactive += int((~mask).sum())
            if revived := int((weight[~mask] != 0).sum()):
                key = f"{name}.weight".removeprefix(".")
                raise ValueError(
                    f"{source}: {key}: expected zeros where the mask is off, got {revived} weights "
                    "that are not zero"
                )
    return WeightCount(total=total, zero=zero, inactive=inactive)


def find_runs(path: Path) -> list[Path]:
    """`path` itself if it is a run directory, or else the run directories anywhere below it.

    Raises:
        FileNotFoundError: there is none.
    """
    if (path / LAST).is_file():
        return [path]
    found = sorted(file.parent for file in path.rglob(LAST))
    if not found:
        raise FileNotFoundError(f"run: expected a run directory, found no {LAST} in {path}")
    return found


def read_run(directory: Path) -> RunResult:
    """Read a run directory.

    Raises:
        ValueError: the checkpoint is damaged, masks and zeros disagree, or the counts are not
            those the run printed.
    """
    has_summary = (directory / SUMMARY).is_file()
    summary = read_summary(directory / SUMMARY) if has_summary else None
    path = directory / (LAST if summary is None else summary.checkpoint)
    checkpoint = load_checkpoint(path)
    counted = count_weights(checkpoint.network, str(path))
    if summary is not None and counted.active != summary.active_weights:
        raise ValueError(
            f"{path}: expected {summary.active_weights:,} active weights as in {SUMMARY}, counted "
            f"{counted.active:,}"
        )
    flops = checkpoint.entries["flops"]
    ratio = flops["sparse_total"] / flops["dense_total"] if flops["dense_total"] else None
    return RunResult(
        directory=directory,
        checkpoint=path,
        config=checkpoint.config,
        processes=1 + len(checkpoint.entries["other_rngs"]),
        summary=summary,
        counted=counted,
        seconds=summary.seconds if summary else checkpoint.entries["progress"]["seconds"],
        train_flops_ratio=summary.train_flops_ratio if summary else ratio,
    )


def setup_of(run: RunResult) -> dict[str, object]:
    """What makes two runs comparable: every field that matters but the seed, and the processes."""
    config = run.config
    ignored = MACHINE_FIELDS | {"seed"} | (SPARSE_FIELDS if config.method == "dense" else set())
    if not config.model_ema:
        ignored |= {"model_ema_decay"}
    fields = {name: getattr(config, name) for name in field_schemas() if name not in ignored}
    return fields | {"processes": run.processes}


def group_runs(runs: Sequence[RunResult]) -> list[list[RunResult]]:
    """Runs of one setup together, in order of first appearance."""
    groups: dict[str, list[RunResult]] = {}
    for run in runs:
        groups.setdefault(repr(setup_of(run)), []).append(run)
    return list(groups.values())


def repeated(runs: Sequence[RunResult]) -> dict[int, RunResult]:
    """Runs (by their place) that have the setup and seed of another, which is to be counted: the first
    that has finished, or the first. A mean over both would pretend to know more than it does.
    """
    counted: dict[str, RunResult] = {}
    for run in sorted(runs, key=lambda run: run.summary is None):
        counted.setdefault(repr((setup_of(run), run.config.seed)), run)
    others = {}
    for place, run in enumerate(runs):
        other = counted[repr((setup_of(run), run.config.seed))]
        if other is not run:
            others[place] = other
    return others


def varying_fields(runs: Sequence[RunResult]) -> list[str]:
    """Fields in which setups differ, beyond method and sparsity, which have their columns."""
    setups = [setup_of(run) for run in runs]
    names = [name for name in (*field_schemas(), "processes") if name not in ("method", "sparsity")]
    return [
        name
        for name in names
        # A field that dense runs do not use varies only if the others differ in it.
        if len({repr(setup[name]) for setup in setups if name in setup}) > 1
    ]
