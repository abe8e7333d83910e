"""Exact selection over all of ResNet-50's weights, in streaming reads of them."""

from __future__ import annotations

import pytest

from bench.cpu import selectors, verdict
from bench.cpu.targets import SELECT_MASK, SELECT_PRUNE
from bench.cpu.tensors import make_tensors

SECONDS_READS, SECONDS_FINDERS = 5.0, 14.0
# Share kept, of weights of this sparsity: a fresh network, and one in the middle of a ramp, whose
# many zeros are what partitioning stumbles over.
STATES = ((0.2, 0.0), (0.1, 0.8))
OPERATORS = {
    selectors.MASK: ("topk_mask", SELECT_MASK),
    selectors.PRUNE: ("prune_", SELECT_PRUNE),
    selectors.PRUNE_MOMENTUM: ("prune_", None),
}


def _rows(done, tensors, keep, sparsity, threads, baseline, *, ours, target, cost):
    row = verdict.row(
        done,
        group="selection",
        case=f"{keep:.0%} of {tensors.numel / 1e6:.1f} M",
        measure=selectors.MEASURE,
        threads=threads,
        sparsity=sparsity,
        baseline=baseline,
        ours=ours,
        operator=OPERATORS[ours][0],
        cost=cost,
        target=target,
    )
    return [row] if row else []


@pytest.mark.parametrize(("keep", "sparsity"), STATES)
def test_in_reads(keep, sparsity, threads, effort, race, ledger):
    """A race of the fast ones alone, so that there is time for many rounds."""
    tensors = make_tensors(sparsity, quick=effort.quick)
    k = round(tensors.numel * keep)
    read = [c for c in selectors.finders(tensors, k) if c.role == selectors.READ]
    done = race([*read, *selectors.ours(tensors, k)], SECONDS_READS, least=1)
    for ours, (_, target) in OPERATORS.items():
        target = None if effort.quick else target  # what fits a cache is no stream
        ledger += _rows(
            done,
            tensors,
            keep,
            sparsity,
            threads,
            selectors.READ,
            ours=ours,
            target=target,
            cost=True,
        )
        if reason := done.failure(ours):
            pytest.fail(reason)


@pytest.mark.parametrize(("keep", "sparsity"), STATES)
def test_against_finders(keep, sparsity, threads, effort, race, ledger):
    """Against what one would call without us."""
    tensors = make_tensors(sparsity, quick=effort.quick)
    k = round(tensors.numel * keep)
    others = [c for c in selectors.finders(tensors, k) if c.role != selectors.READ]
    own = [c for c in selectors.ours(tensors, k) if c.role == selectors.MASK]
    done = race([*others, *own], SECONDS_FINDERS, least=1)
    for baseline in (c.role for c in others):
        ledger += _rows(
            done,
            tensors,
            keep,
            sparsity,
            threads,
            baseline,
            ours=selectors.MASK,
            target=None,
            cost=False,
        )
