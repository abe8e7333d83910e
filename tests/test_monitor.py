"""What updates did, layer by layer: against counts from bool masks, and where it goes."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from granet import GraNet
from granet.methods import GMP
from granet.monitor import Csv, JsonLines, LayerChange, Scalars, TopologyMonitor
from granet.training.train import train
from granet_kernels import MaskedSGD, sparsify
from tests.tiny_runs import tiny, tiny_config  # noqa: F401

STEPS = 24


def parts(memory_format: torch.memory_format = torch.contiguous_format, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 9), nn.Linear(9, 4)
    )
    model = sparsify(model).to(memory_format=memory_format)
    optimizer = MaskedSGD(model.parameters(), lr=0.05, momentum=0.9)
    settings = {"sparsity": 0.8, "initial_sparsity": 0.5, "update_every": 4} | settings
    return model, optimizer, GraNet(model, optimizer, total_steps=STEPS, **settings)


def train_to(stop: int, made: Any, start: int = 0) -> None:
    model, optimizer, sparsifier = made
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(8, 2, 5, 5, generator=generator)).square().mean().backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_rows_are_what_the_masks_say(memory_format: torch.memory_format) -> None:
    made = parts(memory_format)
    sparsifier = made[2]
    rows: list[LayerChange] = []
    monitor = TopologyMonitor(sparsifier, rows.extend)
    explored = {name: layer.mask for name, layer in sparsifier.layers.items()}
    regrown = {name: torch.zeros_like(mask) for name, mask in explored.items()}
    for step in range(STEPS):
        before = {name: layer.mask for name, layer in sparsifier.layers.items()}
        train_to(step + 1, made, step)
        monitor.flush()
        if (step + 1) % 4 or step + 1 == STEPS:
            continue
        for row, (name, layer) in zip(rows[-3:], sparsifier.layers.items(), strict=True):
            after = layer.mask
            explored[name] |= after
            fresh = after & ~before[name]
            was = int(regrown[name].sum())
            assert (row.layer, row.step, row.numel) == (name, step + 1, after.numel())
            assert row.active == int(after.sum())
            assert row.sparsity == pytest.approx(1 - int(after.sum()) / after.numel())
            assert row.pruned + row.dropped - row.regrown == int(before[name].sum()) - row.active
            assert row.dropped == row.regrown
            # Of what grew some may have been pruned by the same update.
            assert 0 <= row.regrown - int(fresh.sum()) <= row.pruned
            assert row.churn == pytest.approx(row.regrown / row.active)
            assert row.explored == pytest.approx(int(explored[name].sum()) / after.numel())
            survivors = int((regrown[name] & after).sum())
            assert row.survival == (pytest.approx(survivors / was) if was else None)
            dead = int((~after.flatten(1).any(1)).sum())
            assert (row.dead_channels, row.channels) == (dead, after.shape[0])
            regrown[name] = (
                fresh if row.regrown == int(fresh.sum()) else monitor_regrown(monitor, name)
            )
    assert [row.step for row in rows[::3]] == [4, 8, 12, 16, 20]


def monitor_regrown(monitor: TopologyMonitor, name: str) -> torch.Tensor:
    from granet_kernels import BitMask

    packed = monitor.state_dict()["regrown"][name]
    return BitMask.from_canonical(packed, monitor._layers[name].weight.shape).to_bool()


def test_pruning_alone_neither_drops_nor_regrows() -> None:
    model = sparsify(nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10)))
    optimizer = MaskedSGD(model.parameters(), lr=0.1)
    sparsifier = GMP(model, optimizer, sparsity=0.9, total_steps=STEPS, update_every=4)
    rows: list[LayerChange] = []
    monitor = TopologyMonitor(sparsifier, rows.extend)
    for _ in range(STEPS):
        model(torch.randn(3, 10)).square().mean().backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
    monitor.flush()
    assert all(
        (row.dropped, row.regrown, row.churn, row.survival) == (0, 0, 0, None) for row in rows
    )
    assert sum(row.pruned for row in rows) == 180
    assert all(row.explored == 1 for row in rows)


def test_a_collapsing_layer_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, _ = parts()
    with torch.no_grad():
        model[3].weight.mul_(1e-9)
    optimizer = MaskedSGD(model.parameters(), lr=0.0)
    sparsifier = GMP(model, optimizer, sparsity=0.9, total_steps=STEPS, update_every=4, floor=0)
    monitor = TopologyMonitor(sparsifier)
    with caplog.at_level(logging.WARNING, "granet"):
        train_to(STEPS, (model, optimizer, sparsifier))
        monitor.flush()
    [record] = caplog.records
    assert "3 has collapsed: 9 of 9 output channels are dead, 0 of 486" in record.getMessage()


def test_a_resumed_monitor_goes_on_counting() -> None:
    whole, pieces = parts(), parts()
    seen: dict[str, list[LayerChange]] = {"whole": [], "pieces": []}
    monitors = {
        "whole": TopologyMonitor(whole[2], seen["whole"].extend),
        "pieces": TopologyMonitor(pieces[2], seen["pieces"].extend),
    }
    train_to(STEPS, whole)
    monitors["whole"].flush()
    train_to(10, pieces)
    states = [part.state_dict() for part in pieces]
    monitored = monitors["pieces"].state_dict()
    again = parts(memory_format=torch.channels_last)  # states do not depend on the layout
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    monitor = TopologyMonitor(again[2], seen["pieces"].extend)
    monitor.load_state_dict(monitored)
    train_to(STEPS, again, 10)
    monitor.flush()
    first, second = seen["whole"], seen["pieces"]
    assert [row.step for row in first] == [row.step for row in second]
    assert [row.explored for row in first[:9]] == [row.explored for row in second[:9]]
    assert all(row.survival is not None for row in second[6:9])
    with pytest.raises(ValueError, match="state: expected explored of 0, 3, 4, got 0"):
        monitor.load_state_dict({"explored": {"0": None}, "regrown": {}})


def test_where_rows_go(tmp_path: Path) -> None:
    class Writer:
        def __init__(self) -> None:
            self.scalars: list[tuple[str, float, int]] = []

        def add_scalar(self, *scalar: Any) -> None:
            self.scalars.append(scalar)

    made, writer = parts(), Writer()
    table = Csv(tmp_path / "topology.csv")
    TopologyMonitor(made[2], JsonLines(tmp_path / "topology.jsonl"), Scalars(writer), table)
    train_to(9, made)
    lines = [json.loads(line) for line in (tmp_path / "topology.jsonl").read_text().splitlines()]
    assert [line["layer"] for line in lines] == ["0", "3", "4"]  # the second waits for the third
    assert set(lines[0]) == {field.name for field in dataclasses.fields(LayerChange)}
    assert ("topology/sparsity/0", lines[0]["sparsity"], 4) in writer.scalars
    train_to(STEPS, made, 9)
    with table.path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["0", "3", "4"] * 4
    assert list(rows[0]) == [field.name for field in dataclasses.fields(LayerChange)]


def test_a_run_keeps_its_topology_in_a_table(tmp_path: Path) -> None:
    train(tiny_config(tmp_path))
    with (tmp_path / "run" / "topology.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [
        step for step in range(2, 15, 2) for _ in range(3)
    ]
    assert sum(int(row["active"]) for row in rows[-3:]) == 159
