"""Whole networks in inference mode: sparsify(), and compress() where there is one, against dense.

Dense is the best of both memory formats, with batch norms as they are and folded into the weights.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torchvision", reason="the networks are torchvision's")

from bench.cpu import network_rows
from bench.cpu.conftest import ALL_THREADS
from bench.cpu.networks import QUICK_RESNET18, RESNET18, RESNET50, RESNET50_ALONE, Network

SECONDS = 8.0


def measure(network: Network, threads, effort, race, ledger, least: int) -> None:
    ledger += network_rows.measure(
        network,
        "inference",
        sparsities=effort.sparsities,
        threads=threads,
        race=race,
        seconds=SECONDS,
        least=least,
        with_peak=threads == ALL_THREADS and not effort.quick,
        targets={},
    )


def test_resnet18(threads, effort, race, ledger):
    network = QUICK_RESNET18 if effort.quick else RESNET18
    measure(network, threads, effort, race, ledger, least=3)


def test_resnet50_alone(threads, effort, race, ledger):
    measure(RESNET50_ALONE, threads, effort, race, ledger, least=5)


def test_resnet50(all_threads, effort, race, ledger):
    """On all cores alone: on one, a round takes half a minute."""
    if effort.quick:
        pytest.skip("takes longer than --quick may")
    measure(RESNET50, all_threads, effort, race, ledger, least=2)
