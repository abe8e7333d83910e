"""``fully_shard`` (FSDP2) with gloo: rows of weights on every rank, and the masks of one process."""

from __future__ import annotations

import functools
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from granet import GraNet
from granet.sharded import Sharding, magnitude_bits
from granet_kernels import use_backend
from tests.rank_cases import (
    SHARDED,
    STEPS,
    batch,
    loss_of,
    make_method,
    make_optimizer,
    network,
    optimizers_of,
    step_with_given_gradients,
)
from tests.ranks import result_of, run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]


def single(
    kind: str = "granet", opt: str = "sgd"
) -> tuple[nn.Module, torch.optim.Optimizer, GraNet]:
    model = network(dtype=torch.float32)
    optimizer = make_optimizer(model, opt)
    return model, optimizer, make_method(kind, model, optimizer)


def finished(kind: str = "granet", opt: str = "sgd") -> dict[str, Any]:
    with use_backend("reference"):
        parts = single(kind, opt)
        for step in range(STEPS):
            step_with_given_gradients(parts, step)
        return _result(parts)


def _result(parts: tuple[nn.Module, torch.optim.Optimizer, GraNet]) -> dict[str, Any]:
    masks = {name: layer.mask for name, layer in parts[2].layers.items()}
    return {"model": parts[0].state_dict(), "masks": masks}


def assert_masks(got: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, mask in expected["masks"].items():
        assert torch.equal(got["masks"][name], mask), name


@pytest.mark.parametrize("count", [2, 4])
def test_the_same_gradients_give_the_masks_of_one_process_bit_for_bit(
    tmp_path: Path, count: int
) -> None:
    run_ranks("fsdp", count, tmp_path)
    for kind in SHARDED:
        for opt in optimizers_of(kind):
            got = result_of(tmp_path, f"{kind}-{opt}.pt")
            expected = finished(kind, opt)
            assert_masks(got, expected)
            for name, value in expected["model"].items():
                torch.testing.assert_close(got["model"][name], value)
                if name.endswith("weight"):
                    assert torch.equal(got["model"][name] == 0, value == 0)


def test_real_passes_train_what_one_process_trains(tmp_path: Path) -> None:
    run_ranks("fsdp_training", 2, tmp_path)
    with use_backend("reference"):
        parts = single()
        for step in range(STEPS):
            loss_of(parts[0], *batch(step, torch.float32)).backward()
            parts[1].step()
            parts[2].step()
            parts[1].zero_grad()
        expected = _result(parts)
    got = result_of(tmp_path)
    for name, mask in expected["masks"].items():
        # Gradients are sums in another order, so a tie in a thousand may fall the other way.
        assert int((got["masks"][name] ^ mask).sum()) <= 2
    assert sum(int(mask.sum()) for mask in got["masks"].values()) == parts[2].target_active


def test_a_checkpoint_of_four_ranks_is_continued_by_two(tmp_path: Path) -> None:
    run_ranks("fsdp_save", 4, tmp_path)
    run_ranks("fsdp_load", 2, tmp_path)
    assert_masks(result_of(tmp_path), finished("granet-momentum"))


def test_what_cannot_be_sharded_is_refused(tmp_path: Path) -> None:
    run_ranks("fsdp_refused", 2, tmp_path)
    mixed, snip = (tmp_path / "errors").read_text().splitlines()
    assert mixed.startswith("model: expected 0.weight in shards over the same ranks as the others")
    assert snip.startswith("model: snip prunes a dense copy of it, so expected whole weights")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_magnitude_bits_are_in_the_order_of_magnitudes(dtype: torch.dtype) -> None:
    values = [0.0, 5e-324, 1e-310, 1e-40, 1.0, -1.5, 2.0, -1e30, torch.inf, torch.nan]
    bits = magnitude_bits(torch.tensor(values, dtype=dtype))
    assert torch.equal(bits, bits.sort().values)
    nans = magnitude_bits(torch.tensor([torch.nan, -torch.nan], dtype=dtype))
    assert nans[0] == nans[1] > bits[-2]


@pytest.mark.parametrize("count", [0, 1, 3, 7, 9])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_of_all_ranks_are_all_rows(count: int, size: int) -> None:
    rows = [list(range(count))[Sharding(None, rank, size).rows(count)] for rank in range(size)]  # type: ignore[arg-type]
    assert functools.reduce(operator.iadd, rows, []) == list(range(count))
    chunks = [chunk.tolist() for chunk in torch.arange(count).chunk(size)] if count else []
    assert [row for row in rows if row] == [chunk for chunk in chunks if chunk]
