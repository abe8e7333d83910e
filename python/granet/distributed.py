"""Training one model on several processes: the same masks everywhere, and the proof of it.

Under ``DistributedDataParallel`` every rank has whole weights, and gradients that are averages over
all ranks; from equal masks, weights and gradients every rank computes equal updates. So masks are
sent once, when a sparsifier is made; after that only a number for each layer is exchanged at an
update, and compared. Masks are left out of DDP's own broadcasting of buffers, which would send them
at every forward pass, and would hide that they differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from granet.topology import Topology
from granet_kernels import MaskedConv2d, MaskedLinear

BUFFERS = ("packed_mask", "dense_grad")
"""Of a masked layer, that no one but a sparsifier may write to."""


class Replicas:
    """The ranks that train the same model: one, where nothing is distributed."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group

    @classmethod
    def of(cls, model: nn.Module, group: dist.ProcessGroup | None) -> Replicas:
        """The ranks of ``group``, by default all that there are."""
        if not dist.is_available() or not dist.is_initialized():
            return cls(None)
        leave_masks_alone(model)
        group = dist.group.WORLD if group is None else group
        return cls(group if dist.get_world_size(group) > 1 else None)

    def __getstate__(self) -> dict[str, object]:
        return {"_group": None}  # process groups cannot be copied, and copies train on their own

    def share_generator(self, topology: Topology) -> None:
        """Give every rank the first one's random state, before anything random happens."""
        if self._group is None:
            return
        state = topology.generator.get_state().to(topology.masks[0].device)
        self.send([state])
        topology.generator.set_state(state.cpu())

    def share_masks(self, topology: Topology) -> None:
        """Give every rank the first one's masks."""
        if self._group is not None:
            self.send(topology.masks)
            topology.settle()

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Give every rank what the first one has in these tensors."""
        if self._group is not None:
            for tensor in tensors:
                dist.broadcast(tensor, dist.get_global_rank(self._group, 0), group=self._group)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Let every tensor become its sum over all ranks."""
        if self._group is not None:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self._group)

    def check(self, topology: Topology) -> None:
        """Compare the masks of all ranks by a 64-bit number for each layer.

        Raises:
            RuntimeError: on every rank, where they differ; it names the layers and a rank.
        """
        if self._group is None:
            return
        own = torch.stack([fingerprint(mask) for mask in topology.masks])
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(everyone, own, group=self._group)
        for rank, theirs in enumerate(everyone):
            differs = (theirs != everyone[0]).tolist()
            if any(differs):
                names = [n for n, d in zip(topology.layers, differs, strict=True) if d]
                raise RuntimeError(
                    f"masks of {', '.join(names[:4])}{' and others' if len(names) > 4 else ''} differ "
                    f"between ranks 0 and {rank}: were the gradients of the step before the update "
                    "all-reduced, and are weights equal on all ranks?"
                )

    def all_true(self, flags: Sequence[Tensor]) -> bool:
        """Whether all flags are true on all ranks. Waits for the device."""
        if not flags:
            return True
        answer = torch.stack(list(flags)).all().int()
        if self._group is not None:
            dist.all_reduce(answer, dist.ReduceOp.MIN, group=self._group)
        return bool(answer)


def leave_masks_alone(model: nn.Module) -> None:
    """Exclude the masks of a model from the buffers that DDP broadcasts, wrapped already or not.

    A sparsifier does this by itself. Call it before wrapping where the sparsifier is made after
    wrapping, to spare the one broadcast at that time too.
    """
    inner = unwrapped(model)
    names = {
        f"{name}.{buffer}".removeprefix(".")
        for name, module in inner.named_modules()
        if isinstance(module, MaskedConv2d | MaskedLinear)
        for buffer in BUFFERS
    }
    known = set(getattr(inner, "_ddp_params_and_buffers_to_ignore", ()))
    inner._ddp_params_and_buffers_to_ignore = known | names  # type: ignore[assignment]
    wrapper = (
        model if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
    )
    if isinstance(wrapper, DistributedDataParallel):
        wrapper.parameters_to_ignore |= names
        wrapper._assign_modules_buffers()  # it asks its own list whether there is anything to send


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``DistributedDataParallel`` and ``torch.compile``, whose names it has."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def unwrapped_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that takes the steps, inside a wrapper such as accelerate's.

    Such a wrapper passes everything on to its ``optimizer`` and was never initialised as an optimizer
    itself, so it has no hooks. One that has them is left alone: it may do more than what is inside.
    """
    while not hasattr(optimizer, "_optimizer_step_post_hooks"):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer):
            break
        optimizer = inner
    return optimizer


def fingerprint(mask: Tensor) -> Tensor:
    """64 bits, int64 on the mask's device, that differ for different masks but for one case in 2**64.

    The sum of its 8-byte words, each multiplied by an odd number that its place decides.
    """
    words = mask.view(torch.int64)
    places = torch.arange(1, words.numel() + 1, device=mask.device)
    return (_scrambled(words + places) * (_scrambled(places) | 1)).sum()


def _scrambled(x: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele, Lea & Flood, 2014), in wrapping arithmetic."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """A right shift that brings in zeros, which torch has for bytes only."""
    return (x >> by) & ((1 << (64 - by)) - 1)
