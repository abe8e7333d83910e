"""DistributedDataParallel with gloo, started by torchrun: the masks of one process, on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from granet import METHODS
from granet.distributed import BUFFERS, fingerprint, leave_masks_alone
from granet_kernels import MaskedSGD, pack_mask, use_backend
from tests import rank_cases
from tests.rank_cases import SETTINGS, STEPS, batch, loss_of, network
from tests.ranks import result_of, run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]


def single(kind: str = "granet") -> dict[str, Any]:
    """One process with whole batches."""
    with use_backend("reference"):
        model = network()
        optimizer = MaskedSGD(model.parameters(), lr=0.05, momentum=0.9)
        settings = SETTINGS if kind == "granet" else {"sparsity": 0.8, "total_steps": STEPS}
        method: Any = METHODS[kind]
        sparsifier = method(model, optimizer, **settings)
        if hasattr(sparsifier, "start"):
            sparsifier.start([batch(0)])
        for step in range(STEPS):
            loss_of(model, *batch(step)).backward()
            optimizer.step()
            sparsifier.step()
            optimizer.zero_grad()
        masks = {name: layer.mask for name, layer in sparsifier.layers.items()}
        return {"model": model.state_dict(), "masks": masks}


def assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, mask in expected["masks"].items():
        assert torch.equal(got["masks"][name], mask), name
    for name, value in expected["model"].items():
        # Sums over ranks are in another order.
        torch.testing.assert_close(got["model"][name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("case", "count", "kind"),
    [
        ("ddp", 2, "granet"),
        ("ddp", 4, "granet"),
        ("ddp_no_sync", 2, "granet"),
        ("ddp_set", 2, "set"),
        ("ddp_snip", 2, "snip"),
    ],
)
def test_ranks_train_what_one_process_trains(
    tmp_path: Path, case: str, count: int, kind: str
) -> None:
    run_ranks(case, count, tmp_path)
    assert_same(result_of(tmp_path), single(kind))


def test_a_killed_rank_is_restarted_and_resumes(tmp_path: Path) -> None:
    run_ranks("ddp_killed", 2, tmp_path, restarts=1)
    assert (tmp_path / "died").exists()
    assert_same(result_of(tmp_path), single())


def test_masks_that_differ_are_an_error_on_every_rank(tmp_path: Path) -> None:
    run_ranks("ddp_differing", 2, tmp_path)
    for rank in (0, 1):
        message = (tmp_path / f"error-{rank}").read_text()
        assert "differ between ranks 0 and 1" in message
        assert any(f"masks of {name}" in message for name in ("0", "3", "5"))


def test_masks_are_left_out_of_the_buffers_that_ddp_sends() -> None:
    model = network()
    leave_masks_alone(model)
    ignored = model._ddp_params_and_buffers_to_ignore
    assert ignored == {f"{name}.{buffer}" for name in (0, 3, 5) for buffer in BUFFERS}
    leave_masks_alone(nn.Linear(2, 2))


def test_a_fingerprint_tells_masks_apart() -> None:
    torch.manual_seed(0)
    mask = torch.rand(1000) < 0.3
    seen = {int(fingerprint(pack_mask(mask)))}
    for index in range(1000):
        mask[index] ^= True
        seen.add(int(fingerprint(pack_mask(mask))))
        mask[index] ^= True
    assert len(seen) == 1001
    rolled = {int(fingerprint(pack_mask(mask.roll(by)))) for by in range(1000)}
    assert len(rolled) == 1000


def test_every_case_is_started_by_a_test() -> None:
    here = Path(__file__)
    text = here.read_text() + here.with_name("test_fsdp.py").read_text()
    text += here.with_name("test_torchrun.py").read_text()
    assert all(f'"{name}"' in text for name in rank_cases.CASES)
