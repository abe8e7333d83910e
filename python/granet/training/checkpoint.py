"""Checkpoints: written atomically, verified as a whole before anything is restored.

A checkpoint is one `torch.save` file of plain containers and tensors (`weights_only=True` reads
it) with these entries:

    format, version   "granet-checkpoint", 2
    config            every field of TrainConfig
    progress          epoch, batch and step at which the run stands, running sums, best accuracy
    model             state_dict, bit masks included
    optimizer, scheduler, scaler, sparsifier, topology, flops   state_dicts; None where there is no such
    average           state_dict of the averaged network, if there is one; it is what is validated then
    rng               {"cpu": state, "cuda": [state of each device]} of the first process
    other_rngs        the same of the others, if there are any
"""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

import torch
from torch import Tensor, nn

from granet.files import replacing
from granet.training.config import TrainConfig, build_config, resume_conflicts
from granet_kernels import BitMask, masked_layers

FORMAT = "granet-checkpoint"
VERSION = 2
STATES = ("model", "optimizer", "scheduler", "scaler", "sparsifier", "topology", "flops")
ENTRIES = frozenset(("config", "progress", "rng", *STATES))
OPTIONAL: dict[str, Any] = {"average": None, "other_rngs": []}
"""Entries that a run of one process without an average can do without."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what was expected."""


class Stateful(Protocol):
    """Anything with a state_dict that can be given back."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> object: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A file that was read, and is known to be a checkpoint of this version."""

    path: Path
    """Where it was read from."""
    config: TrainConfig
    """The run it belongs to."""
    entries: dict[str, Any]
    """The entries listed at the top of this module; tensors on the CPU."""

    @property
    def network(self) -> dict[str, Tensor]:
        """state_dict of what the run makes: the averaged network, or else the one it trains."""
        average: dict[str, Tensor] | None = self.entries["average"]
        if average is None:
            model: dict[str, Tensor] = self.entries["model"]
            return model
        prefix = "module."  # of torch's AveragedModel, which has a counter besides
        return {k.removeprefix(prefix): v for k, v in average.items() if k.startswith(prefix)}


def save_checkpoint(path: Path, entries: Mapping[str, Any]) -> None:
    """Write `entries` to `path`: after a crash there is the old file or the new one, whole."""
    if missing := ENTRIES - entries.keys():
        raise ValueError(f"entries: expected {sorted(ENTRIES)}, got none of {sorted(missing)}")
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save({"format": FORMAT, "version": VERSION, **entries}, file)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, checking that it is whole and of this format.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: truncated, corrupt, of another format or version, or its configuration
            is not one this version knows.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: expected a file, found none at {path}")
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, depending on where the file breaks
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: expected a granet checkpoint, got: {reason}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected a granet checkpoint, got another kind of file")
    if content.get("version") != VERSION:
        found = content.get("version")
        raise CheckpointError(f"{path}: expected checkpoint version {VERSION}, got {found!r}")
    if missing := ENTRIES - content.keys():
        raise CheckpointError(f"{path}: expected entries {sorted(missing)}, found none of them")
    content = OPTIONAL | content
    if problem := _broken(content):
        raise CheckpointError(f"{path}: expected a granet checkpoint, got one with {problem}")
    config = _saved_config(path, content["config"])
    return Checkpoint(path=path, config=config, entries=content)


def _broken(entries: Mapping[str, Any]) -> str | None:
    """What is not of the kind that it should be, of what this module and others read."""
    kinds: dict[str, type] = {"other_rngs": list}
    kinds |= dict.fromkeys(("config", "progress", "model", "optimizer", "flops", "rng"), Mapping)
    for name, kind in kinds.items():
        if not isinstance(entries[name], kind):
            return f"{type(entries[name]).__name__} as {name}"
    progress, optimizer = entries["progress"], entries["optimizer"]
    for name in ("epoch", "batch", "step", "total_steps"):
        if not isinstance(progress.get(name), int) or progress[name] < 0:
            return f"{progress.get(name)!r} as progress {name}"
    running = progress.get("running")
    if not isinstance(running, Tensor) or running.shape != (3,) or "best_epoch" not in progress:
        return "progress that lacks its sums or its best epoch"
    if not isinstance(optimizer.get("state"), Mapping) or "param_groups" not in optimizer:
        return "an optimizer without state or param_groups"
    if not {"sparse_total", "dense_total"} <= entries["flops"].keys():
        return "flops that lack their totals"
    for state in (entries["rng"], *entries["other_rngs"]):
        own = torch.get_rng_state()
        if not isinstance(state, Mapping) or getattr(state.get("cpu"), "shape", None) != own.shape:
            return "a random state of another kind"
    return None


def check_progress(checkpoint: Checkpoint, *, processes: int, batches: int) -> None:
    """Raise CheckpointError unless it stands in an epoch of so many batches, of so many processes."""
    path, progress = checkpoint.path, checkpoint.entries["progress"]
    saved = 1 + len(checkpoint.entries["other_rngs"])
    if saved != processes:
        raise CheckpointError(
            f"{path}: expected a run of {processes} processes, got one of {saved}"
        )
    if progress["batch"] > batches:
        raise CheckpointError(
            f"{path}: expected an epoch of {batches} batches, got batch {progress['batch']}"
        )


def _check_archive(path: Path) -> None:
    """`torch.load` does not compare checksums: flipped bits would become weights."""
    try:
        with zipfile.ZipFile(path) as archive:  # not testzip(): it believes a damaged size of 0
            entries = archive.infolist()
            damaged = next((e.filename for e in entries if crc32(archive.read(e)) != e.CRC), None)
    except Exception as error:  # zipfile raises many kinds, depending on where the file breaks
        raise CheckpointError(
            f"{path}: expected a whole checkpoint, got a truncated or corrupt file ({error})"
        ) from error
    if damaged is not None:
        raise CheckpointError(
            f"{path}: expected a whole checkpoint, got a corrupt one (checksum of {damaged})"
        )


def _saved_config(path: Path, fields: Any) -> TrainConfig:
    try:
        return build_config(fields)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its configuration does not fit: {error}") from error


def restore(
    checkpoint: Checkpoint,
    *,
    config: TrainConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: Mapping[str, Stateful | None],
) -> None:
    """Put a checkpoint's state into a run built from `config`; all of it, or none.

    `parts` are the entries besides model and optimizer (`scheduler`, `scaler`, `sparsifier`,
    `topology`, `flops`, `average`); None where the run has no such part. Random number generators are
    left alone: see `set_rng_state`.

    Raises:
        CheckpointError: it belongs to a run with other settings, another architecture, masks of
            another shape, or an optimizer with other parameters. Nothing has changed then.
    """
    path, entries = checkpoint.path, checkpoint.entries
    if conflicts := resume_conflicts(checkpoint.config, config):
        listing = _listing("these settings differ", conflicts)
        raise CheckpointError(f"{path}: expected a checkpoint of this run; {listing}")
    check_model_state(path, model, entries["model"])
    _check_optimizer_state(path, optimizer, entries["optimizer"])
    for name, part in parts.items():
        if (part is None) != (entries[name] is None):
            expected, found = ("none", "one") if part is None else ("one", "none")
            raise CheckpointError(f"{path}: expected {expected} as {name}, found {found}")
    _restore_parts(path, entries, {name: part for name, part in parts.items() if part is not None})
    model.load_state_dict(entries["model"])
    optimizer.load_state_dict(entries["optimizer"])


def _restore_parts(path: Path, entries: Mapping[str, Any], parts: Mapping[str, Stateful]) -> None:
    """Load the parts; when one refuses its state, those before it get back what they had."""
    done: dict[str, dict[str, Any]] = {}
    try:
        # The sparsifier last: what it writes into masks and weights could not be taken back.
        for name in sorted(parts, key=lambda name: name == "sparsifier"):
            done[name] = copy.deepcopy(parts[name].state_dict())
            parts[name].load_state_dict(entries[name])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        *complete, failed = done
        for name in complete:
            parts[name].load_state_dict(done[name])
        raise CheckpointError(f"{path}: entry {failed!r} does not fit: {error}") from error


def check_model_state(path: Path, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless `state` has exactly the model's names, shapes and dtypes."""
    own: dict[str, Tensor] = model.state_dict()
    problems = []
    if missing := [name for name in own if name not in state]:
        problems.append(_listing("missing", missing))
    if unexpected := [name for name in state if name not in own]:
        problems.append(_listing("unexpected", unexpected))
    mismatched = [
        f"{name} (expected {_layout(own[name])}, got {_layout(state[name])})"
        for name in own
        if name in state and _layout(own[name]) != _layout(state[name])
    ]
    if mismatched:
        problems.append(_listing("mismatched", mismatched))
    for name, layer in masked_layers(model).items():
        key = f"{name}.packed_mask".removeprefix(".")
        if key in state and not mismatched:
            try:
                BitMask.from_canonical(state[key], layer.weight.shape)
            except ValueError as error:
                problems.append(f"{key}: {error}")
    if problems:
        raise CheckpointError(
            f"{path}: expected a checkpoint of this architecture; {'; '.join(problems)}"
        )


def _layout(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _listing(title: str, names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{title}: {', '.join(names[:limit])}{more}"


def _check_optimizer_state(
    path: Path, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Group sizes, and the shape of every buffer that belongs to a parameter."""
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved = [len(group["params"]) for group in state["param_groups"]]
    if sizes != saved:
        raise CheckpointError(
            f"{path}: expected an optimizer with parameter groups of {sizes}, got {saved}"
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    for parameter, index in zip(parameters, indices, strict=True):
        for name, value in state["state"].get(index, {}).items():
            is_buffer = isinstance(value, Tensor) and value.dim() > 0
            if is_buffer and value.shape != parameter.shape:
                raise CheckpointError(
                    f"{path}: optimizer parameter {index}: expected {name} of shape "
                    f"{tuple(parameter.shape)}, got {tuple(value.shape)}"
                )


def get_rng_state() -> dict[str, Any]:
    """States of PyTorch's global generators: the CPU's and every CUDA device's."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Give back what `get_rng_state` gave; CUDA's only where there are as many devices."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
