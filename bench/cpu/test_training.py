"""Whole training steps: sparsify() and MaskedSGD against the dense network and fused SGD."""

from __future__ import annotations

import pytest

pytest.importorskip("torchvision", reason="the networks are torchvision's")

from bench.cpu import network_rows
from bench.cpu.conftest import ALL_THREADS
from bench.cpu.networks import QUICK_RESNET18, RESNET18, RESNET50
from bench.cpu.targets import RESNET18_STEP

SECONDS = 12.0


def test_resnet18(threads, effort, race, ledger):
    ledger += network_rows.measure(
        QUICK_RESNET18 if effort.quick else RESNET18,
        "training step",
        sparsities=effort.sparsities,
        threads=threads,
        race=race,
        seconds=SECONDS,
        least=3,
        with_peak=threads == ALL_THREADS and not effort.quick,
        targets={} if effort.quick else RESNET18_STEP,
    )


def test_resnet50(all_threads, effort, race, ledger):
    """On all cores alone: on one, a round takes most of a minute."""
    if effort.quick:
        pytest.skip("takes longer than --quick may")
    ledger += network_rows.measure(
        RESNET50,
        "training step",
        sparsities=effort.sparsities,
        threads=all_threads,
        race=race,
        seconds=SECONDS,
        least=2,
        with_peak=True,
        targets={},
    )
