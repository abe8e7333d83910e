"""What computed a run: the machine, at every start of it, and the algorithm that each layer took."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import granet_kernels
from granet.files import replacing
from granet.host import device_name
from granet_kernels import build_info
from granet_kernels.choices import last_choice
from granet_kernels.ops import backend_for


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """An entry of machine.yaml: what computes a run from a step on."""

    step: int
    """Optimizer steps before this start: 0, or where the run was resumed."""
    device: str
    """As PyTorch calls it."""
    device_name: str
    """The model of the processor or the card."""
    backend: str | None
    """Of granet_kernels, for masked layers; None in a dense run."""
    cpu_kernels: str | None
    """Instruction set of its kernels; None where they are not on the CPU, or not compiled."""
    threads: int
    """That PyTorch computes with on the CPU."""
    processes: int
    """That train together, each on a device of its own or on a part of the CPU."""
    torch: str
    python: str
    granet_kernels: str
    """Version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AlgorithmChange:
    """A row of algorithms.csv: a layer that its backend computes otherwise than before."""

    epoch: int
    """At whose end it was noticed, from 1."""
    layer: str
    algorithm: str
    """What last computed it: sparse or dense kernels."""


def this_machine(
    device: torch.device, *, step: int, is_masked: bool, processes: int = 1
) -> Machine:
    """The machine of this process, with the backend that is chosen at the moment."""
    backend = backend_for("masked_conv2d", device.type) if is_masked else None
    native = build_info()["native"]
    is_compiled = backend == "cpp" and native is not None
    return Machine(
        step=step,
        device=str(device),
        device_name=device_name(device),
        backend=backend,
        cpu_kernels=native["cpu_kernels"] if is_compiled else None,
        threads=torch.get_num_threads(),
        processes=processes,
        torch=str(torch.__version__),
        python=platform.python_version(),
        granet_kernels=granet_kernels.__version__,
    )


def append_machine(path: Path, machine: Machine) -> None:
    """Add an entry to machine.yaml.

    A start at an earlier step takes the place of those after it: what they computed is computed again.
    """
    import yaml

    kept = [known for known in read_machines(path) if known.step < machine.step]
    entries = [dataclasses.asdict(entry) for entry in (*kept, machine)]
    with replacing(path) as temporary:
        temporary.write_text(yaml.safe_dump(entries, sort_keys=False), encoding="utf-8")


def read_machines(path: Path) -> list[Machine]:
    """The entries of machine.yaml; none where a run has not recorded it.

    Raises:
        ValueError: the file holds something else.
    """
    import yaml

    if not path.is_file():
        return []
    try:
        return [Machine(**entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]
    except (TypeError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: expected the machines of a granet run: {reason}") from None


class AlgorithmWatch:
    """Notices which of its layers the backend computes otherwise than at the look before."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        """``layers``: masked layers by name."""
        self._layers = layers
        self._seen: dict[str, str] = {}

    def changes(self, epoch: int) -> list[AlgorithmChange]:
        """Since the last call; of backends that have one way only there are none, ever."""
        found = []
        for name, layer in self._layers.items():
            mask = layer.packed_mask
            assert isinstance(mask, torch.Tensor)
            algorithm = last_choice(mask)
            if algorithm is not None and self._seen.get(name) != algorithm:
                self._seen[name] = algorithm
                found.append(AlgorithmChange(epoch=epoch, layer=name, algorithm=algorithm))
        return found
