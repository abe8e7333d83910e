"""What one process of several does: ``torchrun -m tests.rank_cases CASE DIRECTORY``.

The tests that start these are ``test_ddp.py`` and ``test_fsdp.py``; results are compared there.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from granet import METHODS, GraNet
from granet.schedules import Constant
from granet.training import build
from granet.training.checkpoint import load_checkpoint
from granet.training.config import TrainConfig
from granet.training.passes import Passes
from granet.training.processes import started_by_torchrun
from granet.training.train import Trainer
from granet_kernels import MaskedSGD, sparsify

STEPS, EVERY, BATCH = 24, 4, 8
SETTINGS: dict[str, Any] = {
    "sparsity": 0.8,
    "initial_sparsity": 0.5,
    "total_steps": STEPS,
    "update_every": EVERY,
}


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Rows that two and four ranks cannot share evenly, and fewer rows than four."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 7, 3), nn.ReLU(), nn.Flatten(), nn.Linear(63, 9), nn.Tanh(), nn.Linear(9, 3)
    )
    return sparsify(model.to(dtype))


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 2, 5, 5, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.randint(3, (BATCH,), generator=generator)


def share(tensor: Tensor) -> Tensor:
    """This rank's part of a batch."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images), labels)


# --- whole weights --------------------------------------------------------------------------------


def make_ddp(kind: str = "granet") -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    # Ranks begin with other weights and seeds, which DDP and the sparsifier make equal.
    model = DistributedDataParallel(network(seed=dist.get_rank()))
    optimizer = MaskedSGD(model.parameters(), lr=0.05, momentum=0.9)
    settings = SETTINGS if kind == "granet" else {"sparsity": 0.8, "total_steps": STEPS}
    method: Any = METHODS[kind]
    return model, optimizer, method(model, optimizer, seed=dist.get_rank(), **settings)


def ddp(directory: Path, accumulate: int = 1, kind: str = "granet") -> None:
    model, optimizer, sparsifier = make_ddp(kind)
    if hasattr(sparsifier, "start"):
        sparsifier.start([tuple(map(share, batch(0)))])
    for step in range(STEPS):
        images, labels = map(share, batch(step))
        for piece in range(accumulate):
            is_last = piece == accumulate - 1
            with nullcontext() if is_last else model.no_sync():
                part, target = images.chunk(accumulate)[piece], labels.chunk(accumulate)[piece]
                (loss_of(model, part, target) / accumulate).backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
    save(directory, model.module, sparsifier)


def ddp_no_sync(directory: Path) -> None:
    ddp(directory, accumulate=2)


def ddp_set(directory: Path) -> None:
    ddp(directory, kind="set")


def ddp_snip(directory: Path) -> None:
    ddp(directory, kind="snip")


def ddp_killed(directory: Path) -> None:
    """The last rank dies once in the middle; torchrun starts all of them again, and they resume."""
    model, optimizer, sparsifier = make_ddp()
    newest = directory / "newest.pt"
    start = 0
    if newest.exists():
        saved = torch.load(newest, weights_only=True)
        start = saved["step"]
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        sparsifier.load_state_dict(saved["sparsifier"])
    for step in range(start, STEPS):
        loss_of(model, *map(share, batch(step))).backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0 and step % 3 == 0:
            states = {
                "step": step + 1,
                "model": model.module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "sparsifier": sparsifier.state_dict(),
            }
            torch.save(states, directory / "writing.pt")
            os.replace(directory / "writing.pt", newest)
        dist.barrier()
        is_last = dist.get_rank() == dist.get_world_size() - 1
        if step == 14 and is_last and not (directory / "died").exists():
            (directory / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    save(directory, model.module, sparsifier)


def ddp_differing(directory: Path) -> None:
    """Gradients of the step before an update that no one averaged."""
    model, optimizer, sparsifier = make_ddp()
    before = sparsifier.layers["3"].mask
    if dist.get_rank() == 1:
        sparsifier.layers["3"].mask = ~before  # no one may put this right behind our back
    model(batch(0)[0])
    assert torch.equal(sparsifier.layers["3"].mask, before) == (dist.get_rank() != 1)
    sparsifier.layers["3"].mask = before
    try:
        for step in range(STEPS):
            with model.no_sync():
                loss_of(model, *map(share, batch(step))).backward()
            optimizer.step()
            sparsifier.step()
            optimizer.zero_grad()
    except RuntimeError as error:
        (directory / f"error-{dist.get_rank()}").write_text(str(error))


# --- rows of weights ------------------------------------------------------------------------------

SHARDED: dict[str, dict[str, Any]] = {
    "granet": {},
    "granet-momentum": {"grow": "momentum", "redistribution": "momentum", "regrown": "layer_mean"},
    "granet-random": {
        "grow": "random",
        "drop": "sign",
        "redistribution": "magnitude",
        "scope": "layer",
    },
    # Selections of none and of all.
    "granet-none": {"drop_fraction": 0.0},
    "granet-all": {"drop_fraction": Constant(value=1.0), "drop": "random"},
    "granet-signs": {"drop_fraction": Constant(value=1.0), "drop": "sign"},
    "rigl": {"method": "rigl", "initial_sparsity": None, "update_until": 12},
    "lottery-ticket": {
        "method": "lottery-ticket",
        "initial_sparsity": None,
        "update_every": None,
        "rounds": 2,
    },
}


def make_method(kind: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """A method of :data:`SHARDED`, on one process or several."""
    settings = SETTINGS | SHARDED[kind]
    method: Any = METHODS[settings.pop("method", "granet")]
    given = {name: value for name, value in settings.items() if value is not None}
    return method(model, optimizer, **given)


def make_fsdp(
    kind: str = "granet", opt: str = "sgd"
) -> tuple[nn.Module, torch.optim.Optimizer, GraNet]:
    model = network(dtype=torch.float32)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[3], model[5]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = make_optimizer(model, opt)
    return model, optimizer, make_method(kind, model, optimizer)


def make_optimizer(model: nn.Module, opt: str) -> torch.optim.Optimizer:
    if opt == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-2)
    kind = MaskedSGD if opt == "masked" else torch.optim.SGD
    return kind(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def optimizers_of(kind: str) -> tuple[str, ...]:
    """All of them with the first kinds, to save time."""
    return ("sgd", "adamw", "masked") if kind in list(SHARDED)[:3] else ("sgd",)


def given_gradients(model: nn.Module, step: int) -> None:
    """The same on one process and on several: with repeated magnitudes, so that ties are decided."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        values = torch.randint(-40, 40, parameter.shape, generator=generator) / 16.0
        if isinstance(parameter, DTensor):
            values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
        parameter.grad = values


def step_with_given_gradients(
    parts: tuple[nn.Module, torch.optim.Optimizer, GraNet], step: int
) -> None:
    model, optimizer, sparsifier = parts
    given_gradients(model, step)
    optimizer.step()
    sparsifier.step()
    optimizer.zero_grad()


def fsdp(directory: Path) -> None:
    for kind in SHARDED:
        for opt in optimizers_of(kind):
            parts = make_fsdp(kind, opt)
            assert isinstance(parts[0][0].weight, DTensor)
            copied, _, _ = make_fsdp(kind, opt)
            parts[2].follow(copied)
            for step in range(STEPS):
                step_with_given_gradients(parts, step)
            for name, layer in parts[2].layers.items():
                follower = copied.get_submodule(name)
                mask = follower.mask
                assert torch.equal(mask, layer.mask)
                assert not follower.weight.full_tensor()[~mask].any()
            momentum = next(iter(parts[1].state[parts[0][3].weight].values()))
            assert momentum is None or opt == "adamw" or momentum.to_local().numel() < 63 * 9
            save(directory, parts[0], parts[2], f"{kind}-{opt}.pt")


def fsdp_training(directory: Path) -> None:
    """Real forward and backward passes, each rank with its share of the batch."""
    model, optimizer, sparsifier = make_fsdp()
    for step in range(STEPS):
        loss_of(model, *map(share, batch(step, torch.float32))).backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
    save(directory, model, sparsifier)


def fsdp_save(directory: Path) -> None:
    parts = make_fsdp("granet-momentum")
    for step in range(STEPS // 2 - 1):
        step_with_given_gradients(parts, step)
    dcp.save(_states(parts), checkpoint_id=directory / "checkpoint")


def fsdp_load(directory: Path) -> None:
    parts = make_fsdp("granet-momentum")
    for step in range(STEPS // 2 - 1):  # so that there are states to load into, of other values
        step_with_given_gradients(parts, step + 1000)
    states = _states(parts)
    dcp.load(states, checkpoint_id=directory / "checkpoint")
    set_state_dict(
        parts[0], parts[1], model_state_dict=states["model"], optim_state_dict=states["optimizer"]
    )
    parts[2].load_state_dict(states["sparsifier"])
    for step in range(STEPS // 2 - 1, STEPS):
        step_with_given_gradients(parts, step)
    save(directory, parts[0], parts[2])


def _states(parts: tuple[nn.Module, torch.optim.Optimizer, GraNet]) -> dict[str, Any]:
    model, optimizer = get_state_dict(parts[0], parts[1])
    return {"model": model, "optimizer": optimizer, "sparsifier": parts[2].state_dict()}


def fsdp_refused(directory: Path) -> None:
    errors = []
    model = network(dtype=torch.float32)
    fully_shard(model[3], mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    for method, settings in (("granet", SETTINGS), ("snip", {"sparsity": 0.5, "total_steps": 9})):
        if method == "snip":
            fully_shard(model)
        try:
            METHODS[method](model, make_optimizer(model, "sgd"), **settings)  # type: ignore[call-arg]
        except ValueError as error:
            errors.append(str(error))
    if dist.get_rank() == 0:
        (directory / "errors").write_text("\n".join(errors))


def save(directory: Path, model: nn.Module, sparsifier: Any, name: str = "result.pt") -> None:
    weights = {
        key: value.full_tensor() if isinstance(value, DTensor) else value
        for key, value in model.state_dict().items()
    }
    masks = {name: layer.mask for name, layer in sparsifier.layers.items()}
    if dist.get_rank() == 0:
        torch.save({"model": weights, "masks": masks}, directory / name)


# --- granet train ---------------------------------------------------------------------------------


def passes(directory: Path) -> None:
    """Gradients and metrics of two accumulated batches a process, beside those of all in one process."""
    config = TrainConfig(grad_accum_steps=2, smoothing=0.1, clip_grad=0.05)
    processes = started_by_torchrun()
    ours, alone = network(), network()
    batches = [batch(number) for number in range(2 * processes.count)]
    mine = batches[processes.rank :: processes.count]
    seen: list[int] = []
    passing = Passes(config, ours, torch.device("cpu"), processes=processes)
    optimizer = MaskedSGD(ours.parameters(), lr=0.5)
    scaler = build.build_scaler(config, torch.device("cpu"))
    assert passing.step(mine, lambda *_: seen.append(1), optimizer, scaler)
    assert len(seen) == 2

    for images, labels in batches:
        loss = nn.functional.cross_entropy(alone(images), labels, label_smoothing=0.1)
        (loss / len(batches)).backward()
    nn.utils.clip_grad_norm_(alone.parameters(), 0.05)
    MaskedSGD(alone.parameters(), lr=0.5).step()
    for got, expected in zip(ours.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)

    few = batches[:3]  # of which one process has two
    expected_loss = torch.stack([loss_of(alone, *some) for some in few]).mean()
    loss_value, accuracy = passing.evaluate(iter(few[processes.rank :: processes.count]))
    assert abs(loss_value - float(expected_loss)) < 1e-9
    correct = sum(int((alone(images).argmax(1) == labels).sum()) for images, labels in few)
    assert accuracy == 100 * correct / (3 * BATCH)


def best_epoch(directory: Path) -> None:
    """Every process tests the network of the best epoch, whose masks are not the last ones."""
    config = TrainConfig(
        epochs=2, batch_size=64, update_freq=3, prune_end="30%", log_interval=0, seed=1, channels_last=True,
        output=str(directory), experiment="run",
    )  # fmt: skip
    trainer = Trainer(config, started_by_torchrun())
    evaluate, accuracies = trainer.evaluate, [90.0, 10.0]
    trainer.evaluate = lambda batches: (  # type: ignore[method-assign]
        (evaluate(batches)[0], accuracies.pop(0)) if accuracies else evaluate(batches)
    )
    summary = trainer.run()
    assert summary.epoch == 1
    best = load_checkpoint(directory / "run" / "best.pt").network
    last = load_checkpoint(directory / "run" / "last.pt").network
    state = trainer.network.state_dict()
    for name, value in best.items():
        assert torch.equal(state[name], value), name
    masks = [name for name in best if name.endswith("packed_mask")]
    assert not all(torch.equal(best[name], last[name]) for name in masks)


CASES: dict[str, Callable[[Path], None]] = {
    case.__name__: case
    for case in (
        ddp,
        ddp_no_sync,
        ddp_set,
        ddp_snip,
        ddp_killed,
        ddp_differing,
        fsdp,
        fsdp_training,
        fsdp_save,
        fsdp_load,
        fsdp_refused,
        passes,
        best_epoch,
    )
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    # A store of each attempt's own: restarted processes may find the addresses of killed ones in torchrun's.
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{sys.argv[2]}/store-{sys.argv[1]}-{attempt}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    CASES[sys.argv[1]](Path(sys.argv[2]))
    dist.barrier()  # a rank that leaves early aborts the others' last messages
    dist.destroy_process_group()
    # Not by way of the interpreter's end, where a library's thread that is still running aborts the process,
    # once in a hundred times on a busy machine.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
