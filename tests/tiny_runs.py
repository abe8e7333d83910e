"""Training runs small enough for tests: real digits, 1,590 weights, five steps an epoch."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import granet.data
from granet.training import build
from granet.training.config import TrainConfig

STEPS_PER_EPOCH = 5
WEIGHTS = 1590


def make_network(name: str, *, num_classes: int, in_channels: int) -> nn.Module:
    """Batch norm has statistics to restore, dropout draws from the global generator."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(128, 11, bias=False),
        nn.Linear(11, num_classes, bias=False),
    )


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the network, and read the digits once."""
    monkeypatch.setattr(build, "create_model", make_network)
    monkeypatch.setattr(granet.data, "read_digits", read_digits_once)


@functools.cache
def read_digits_once() -> Any:
    """The digits; the source copies what it changes."""
    return _read_digits()


_read_digits = granet.data.read_digits


def tiny_config(output: Path, **fields: Any) -> TrainConfig:
    """A run of three epochs and fifteen steps, with the last of four prunes at step 8."""
    settings: dict[str, Any] = {
        "output": str(output),
        "experiment": "run",
        "epochs": 3,
        "batch_size": 256,
        "warmup_epochs": 0.4,
        "update_freq": 2,
        "log_interval": 0,
    }
    if fields.get("method", "granet") in ("granet", "gmp"):
        settings["prune_end"] = 8
    return TrainConfig(**(settings | fields))


def same(left: Any, right: Any) -> bool:
    """Whether two nests of containers and tensors are equal bit for bit."""
    if isinstance(left, Tensor):
        return (
            isinstance(right, Tensor)
            and left.dtype == right.dtype
            and left.shape == right.shape
            and left.stride() == right.stride()
            and bytes(left.contiguous().view(-1).view(torch.uint8))
            == bytes(right.contiguous().view(-1).view(torch.uint8))
        )
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)
