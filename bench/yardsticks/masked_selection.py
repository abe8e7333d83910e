"""Our selection beside those of selection.py: masks of the largest, pruning, the whole update."""

from __future__ import annotations

import functools

import torch

from bench.registry import Case, Setting, Yardstick, register
from bench.timing import CACHE_MULTIPLE
from bench.yardsticks.ours import BACKENDS, Backend, computed_by, make_masked
from bench.yardsticks.selection import (
    DISTRIBUTIONS,
    DROP_FRACTION,
    KEEP,
    SPARSITY_AFTER,
    SPARSITY_BEFORE,
    Values,
)

ACCOUNT = "sectors of 32 bytes that are touched"

# Name, sparsity before, whether weights are dropped and regrown too. A ramp of 100 epochs prunes a hundredth
# of the weights at each update, or less; a third of the active ones in one go is as hard as it gets.
UPDATES = (
    ("prune", SPARSITY_BEFORE, False),
    ("prune_little", 0.89, False),
    ("update", SPARSITY_BEFORE, True),
)


def build_topk_mask(backend: Backend, distribution: str, setting: Setting) -> Case:
    """topk_mask of what the other rows of this name are given."""
    around = computed_by(backend, setting, "topk_mask")
    values = Values(distribution, setting)
    k = torch.tensor([int(values.numel * KEEP)], device=setting.device)
    return Case(
        run=lambda: torch.ops.granet.topk_mask([values.next()], k),
        n_tensors=1,
        n_weights=values.numel,
        model_bytes=4 * values.numel + values.numel // 8,
        account="one read + mask: the floor",
        copies=values.copies,
        around=around,
    )


class Update:
    """prune_ over all layers together, and drop_regrow_ behind it where it is the whole update."""

    def __init__(self, before: float, whole: bool, setting: Setting) -> None:
        from granet.distributions import active_budget

        self.whole = whole
        self.state = make_masked(before, "uniform", setting)
        keep = active_budget(SPARSITY_AFTER, self.state.numel)
        self.keep = torch.tensor([keep], device=setting.device)
        self.fraction = torch.tensor(DROP_FRACTION, dtype=torch.float64, device=setting.device)
        self._spent = [*self.state.weights, *self.state.momenta, *self.state.masks]
        self._saved = [tensor.clone() for tensor in self._spent]
        self._sweep = torch.zeros(CACHE_MULTIPLE * setting.cache_bytes // 4, device=setting.device)

    def reset(self) -> None:
        """As before all calls; what the copies left in the cache, to be written, is not the next call's."""
        torch._foreach_copy_(self._spent, self._saved)
        self._sweep.sum()

    def prune(self) -> None:
        state = self.state
        torch.ops.granet.prune_(state.weights, state.masks, self.keep, state.momenta)

    def drop_regrow(self) -> None:
        state = self.state
        torch.ops.granet.drop_regrow_(
            state.weights, state.masks, state.grads, self.fraction, state.momenta
        )

    def run(self) -> None:
        self.prune()
        if self.whole:
            self.drop_regrow()


def triton_bytes(update: Update) -> int:
    """What the Triton backend moves: follows from the arguments, before each call."""
    from granet_kernels.backends.triton.select_accounts import drop_regrow_bytes, prune_bytes

    state = update.state
    moved = prune_bytes(state.weights, state.masks, update.keep, state.momenta)
    update.prune()
    if update.whole:
        lists = state.weights, state.masks, state.grads
        moved += drop_regrow_bytes(*lists, update.fraction, state.momenta)
        update.drop_regrow()
    return moved


def cuda_bytes(update: Update) -> int:
    """What the CUDA backend moves: follows from the masks before and after each call."""
    from granet_kernels.backends.cuda.accounts import drop_regrow_bytes, prune_bytes

    state = update.state
    before = [mask.clone() for mask in state.masks]
    update.prune()
    moved = prune_bytes(state.weights, state.momenta, before, state.masks)
    if update.whole:
        before = [mask.clone() for mask in state.masks]
        update.drop_regrow()
        moved += drop_regrow_bytes(state.weights, state.momenta, state.grads, before, state.masks)
    return moved


ACCOUNTS = {"cuda": cuda_bytes, "triton": triton_bytes}


def check_that_nothing_waits(update: Update, setting: Setting) -> None:
    """Whoever waits for the device in a call raises."""
    if setting.device.type != "cuda":
        return
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        update.run()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def build_update(backend: Backend, before: float, whole: bool, setting: Setting) -> Case:
    """From the same state every time."""
    around = computed_by(backend, setting, "prune_", "drop_regrow_")
    update = Update(before, whole, setting)
    with around():
        moved = ACCOUNTS[backend](update)
        check_that_nothing_waits(update, setting)
    update.reset()
    return Case(
        run=update.run,
        n_tensors=len(update.state.weights),
        n_weights=update.state.numel,
        model_bytes=moved,
        account=ACCOUNT,
        reset=update.reset,
        around=around,
    )


def _rows_of(backend: Backend) -> list[Yardstick]:
    rows = [
        Yardstick(
            group="selection",
            name=f"select_{distribution}",
            variant=backend,
            build=functools.partial(build_topk_mask, backend, distribution),
            baseline=f"select_{distribution}/torch_sum",
            graph=True,
        )
        for distribution in DISTRIBUTIONS
    ]
    rows += [
        Yardstick(
            group="selection",
            name=name,
            variant=backend,
            build=functools.partial(build_update, backend, before, whole),
            sparsity=SPARSITY_AFTER,
            baseline="select_kaiming/torch_sum",
            graph=True,
        )
        for name, before, whole in UPDATES
    ]
    return rows


register(*(row for backend in BACKENDS for row in _rows_of(backend)))
