"""The processes of one run, as torchrun starts them: which GPU each has, and what all must agree on.

Every process has the whole network and sees its own part of the batches; the first one writes the
run's files and speaks to the user. Without torchrun there is one process, and nothing is sent.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those of its run."""

    rank: int = 0
    """Its number, from 0."""
    count: int = 1
    """How many there are on all machines."""
    local_rank: int = 0
    """Its number on this machine."""

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes files and speaks."""
        return self.rank == 0

    def add(self, tensor: Tensor) -> None:
        """Let a tensor become its sum over all processes."""
        if self.count > 1:
            dist.all_reduce(tensor)

    def highest(self, number: int) -> int:
        """The largest of the processes' numbers. On the host: no step of a GPU is waited for."""
        if self.count == 1:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def send(self, tensors: Iterable[Tensor]) -> None:
        """Give every process what the first one has in these tensors."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def share_buffers(self, network: nn.Module) -> None:
        """Give every process the first one's batch norm statistics; masks are equal already."""
        self.send(network.buffers())

    def collect(self, value: Any) -> list[Any]:
        """What each process has, in the order of their numbers."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values


def check_alike(processes: Processes, settings: Mapping[str, object]) -> None:
    """Compare what must be the same in all processes.

    Raises:
        ValueError: in every process, where something is not; names it and a process.
    """
    everyone = processes.collect(dict(settings))
    for rank, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if theirs[name] != value:
                raise ValueError(
                    f"{name}: expected the same in all processes, got {value!r} in process 0 and "
                    f"{theirs[name]!r} in process {rank}"
                )


def started_by_torchrun() -> Processes:
    """This process by torchrun's environment variables; the only one without them."""
    if "WORLD_SIZE" not in os.environ:
        return Processes()
    rank, count, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return Processes(rank, count, local)


@contextmanager
def joined() -> Iterator[Processes]:
    """Meets the other processes, inside `with`."""
    processes = started_by_torchrun()
    if processes.count == 1 or dist.is_initialized():
        yield processes
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(processes.local_rank % torch.cuda.device_count())
    dist.init_process_group()  # gloo for tensors on the CPU and, where there are GPUs, NCCL for theirs
    try:
        yield processes
        dist.barrier()  # one that leaves early would abort the others' last messages
    finally:
        # Before the interpreter ends, or a thread of gloo's that runs still aborts the process: it ends
        # with the last of those that hold the group, DDP among them.
        gc.collect()
        dist.destroy_process_group()
