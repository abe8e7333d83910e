"""The parts of a training run, each built from its configuration."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from granet.at_start import AtStart
from granet.data import DataSource, Share, load_data
from granet.distributions import DISTRIBUTIONS, Explicit, ScaledErk
from granet.engine import Sparsifier
from granet.methods import METHODS, LotteryTicket
from granet.models import create_model
from granet.training.config import TrainConfig
from granet.training.method_arguments import ARGUMENTS, method_parameters
from granet.training.processes import Processes
from granet_kernels import MaskedConv2d, MaskedLinear, MaskedSGD, sparsify

INITIAL_SPARSITY = 0.5
"""Of GraNet, where no other is given: the paper's sparse-to-sparse setting."""


def choose_device(name: str, processes: Processes = Processes()) -> torch.device:  # noqa: B008
    """The device called `name`; `auto` is CUDA where there is one.

    Of several processes on a machine, each has the GPU of its own number.

    Raises:
        ValueError: PyTorch knows no such device, or it is not present, or several processes would
            share one.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and processes.count > 1:
        name = f"cuda:{processes.local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        present = torch.cuda.device_count()
        raise ValueError(
            f"device: expected one of the {present} CUDA devices present, got {name!r}"
            if present
            else f"device: expected cpu where PyTorch finds no CUDA device, got {name!r}"
        )
    if device.type == "cuda" and processes.count > 1 and device.index != processes.local_rank:
        raise ValueError(
            f"device: expected auto, cpu or cuda for {processes.count} processes, got {name!r}"
        )
    return device


def seed_everything(config: TrainConfig) -> None:
    """Seed PyTorch's generators, and choose the algorithms `deterministic` asks for."""
    torch.manual_seed(config.seed)
    torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True, warn_only=True)


def build_source(
    config: TrainConfig,
    device: torch.device,
    processes: Processes = Processes(),  # noqa: B008 - it cannot change
) -> DataSource:
    """Open the data set, of which each process sees its part."""
    return load_data(
        config.dataset,
        data_dir=config.data_dir,
        batch_size=config.batch_size,
        device=device,
        seed=config.seed,
        val_split=config.val_split,
        workers=config.workers,
        image_size=config.image_size,
        share=Share(processes.rank, processes.count),
    )


def usable_batches(config: TrainConfig, steps_per_epoch: int) -> int:
    """Batches of an epoch that make up whole optimizer steps; the rest is dropped.

    Raises:
        ValueError: there is not even one step.
    """
    batches = steps_per_epoch - steps_per_epoch % config.grad_accum_steps
    if batches == 0:
        raise ValueError(
            f"grad_accum_steps: expected at most the {steps_per_epoch} batches of an epoch, got "
            f"{config.grad_accum_steps}"
        )
    return batches


def build_model(config: TrainConfig, source: DataSource, device: torch.device) -> nn.Module:
    """The network on its device, masked unless the run is dense."""
    model = create_model(
        config.model, num_classes=source.num_classes, in_channels=source.sample_shape[0]
    )
    model = model.to(device).to(memory_format=memory_format(config))
    return model if config.method == "dense" else sparsify(model)


def memory_format(config: TrainConfig) -> torch.memory_format:
    """Layout of images and convolution weights."""
    return torch.channels_last if config.channels_last else torch.preserve_format


def prunable_layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """The layers that `sparsify` masks, masked or not; of layers that share a weight, the first."""
    seen: set[int] = set()
    layers: dict[str, nn.Conv2d | nn.Linear] = {}
    for name, module in model.named_modules():
        if type(module) in (nn.Conv2d, nn.Linear, MaskedConv2d, MaskedLinear):
            assert isinstance(module, (nn.Conv2d, nn.Linear))
            if id(module.weight) not in seen:
                seen.add(id(module.weight))
                layers[name] = module
    return layers


def build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """MaskedSGD (torch.optim.SGD where nothing is masked), or AdamW."""
    if config.opt == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    return MaskedSGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov and config.momentum > 0,
    )


def build_sparsifier(
    config: TrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int
) -> Sparsifier | None:
    """The method that changes the masks; None for a dense run."""
    if config.method == "dense":
        return None
    try:
        arguments = _method_arguments(config, total_steps)
        return METHODS[config.method](
            model, optimizer, total_steps=total_steps, seed=config.seed, **arguments
        )
    except ValueError as error:
        raise ValueError(_in_flags(str(error))) from error


def _method_arguments(config: TrainConfig, total_steps: int) -> dict[str, Any]:
    """What a method is given of a configuration; its own defaults hold for the rest."""
    taken = method_parameters(config.method)
    arguments: dict[str, Any] = {"sparsity": config.sparsity}
    if "update_every" in taken:
        arguments["update_every"] = config.update_freq
    if "initial_sparsity" in taken:
        arguments["initial_sparsity"] = min(INITIAL_SPARSITY, config.sparsity)
    for field, argument in ARGUMENTS.items():
        value = getattr(config, field)
        if value is not None and value is not False:
            arguments[argument] = value
    if config.erk_power is not None:
        arguments["distribution"] = ScaledErk(config.erk_power)
    elif config.distribution is not None:
        arguments["distribution"] = _distribution(config.distribution)
    return arguments


def _distribution(text: str) -> str | Explicit:
    """A distribution's name, or sparsities between commas."""
    if text in DISTRIBUTIONS:
        return text
    try:
        return Explicit(tuple(float(part) for part in text.split(",")))
    except ValueError:
        known = ", ".join(DISTRIBUTIONS)
        raise ValueError(
            f"distribution: expected {known}, or a sparsity for each layer between commas, got {text!r}"
        ) from None


def start_sparsifier(
    config: TrainConfig,
    sparsifier: Sparsifier | None,
    source: DataSource,
    device: torch.device,
) -> None:
    """Let a method that prunes before training do so, by the first batches of the first epoch."""
    if isinstance(sparsifier, AtStart):
        batches = itertools.islice(source.train_batches(0, start=0), config.score_batches)
        layout = memory_format(config)
        loss = functools.partial(F.cross_entropy, label_smoothing=config.smoothing)
        sparsifier.start(
            [
                (images.to(device, memory_format=layout), labels.to(device))
                for images, labels in batches
            ],
            loss,
        )


def _in_flags(message: str) -> str:
    """An error about a method's arguments, in the words of whoever wrote the flags."""
    for flag, argument in [("update_freq", "update_every"), *ARGUMENTS.items()]:
        if flag != "erk_power":
            message = message.replace(argument, flag)
    return message


def build_mix(
    config: TrainConfig, num_classes: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Mixup (Zhang et al., 2018) of each training batch, by torchvision; None unless asked for.

    Its random numbers are those of PyTorch's generator of the CPU, which is in the checkpoints.
    """
    if not config.mixup:
        return None
    from torchvision.transforms import v2  # slow to import

    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = v2.MixUp(
        alpha=config.mixup, num_classes=num_classes
    )
    return mix


def lr_factor(
    step: int, *, total_steps: int, warmup_steps: int, sched: Literal["cosine", "step", "step3"]
) -> float:
    """Learning rate at a step (from 0), relative to its peak.

    It rises linearly over `warmup_steps` steps, and is 1 right after them. Then half a cosine
    reaches 0 at `total_steps`, or (`sched="step"`) it falls to a tenth at 50 % of the run and to
    a hundredth at 75 %; `sched="step3"` lets it fall at 30, 60 and 90 %.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if sched == "cosine":
        progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
        return 0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0))
    percents = (50, 75) if sched == "step" else (30, 60, 90)
    return math.prod(0.1 for percent in percents if 100 * step >= percent * total_steps)


def build_scheduler(
    config: TrainConfig,
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    sparsifier: Sparsifier | None = None,
) -> torch.optim.lr_scheduler.LambdaLR:
    """`lr_factor` as a learning rate schedule, one call a step; it starts over with every round."""
    warmup_steps = round(min(config.warmup_epochs, config.epochs) * total_steps / config.epochs)
    rounds = sparsifier if isinstance(sparsifier, LotteryTicket) else None
    length = total_steps if rounds is None else rounds.round_steps

    def factor(step: int) -> float:
        return lr_factor(
            step if rounds is None else rounds.step_of_round(step),
            total_steps=length,
            warmup_steps=min(warmup_steps, length),
            sched=config.sched,
        )

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def build_scaler(config: TrainConfig, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler that float16 needs; for every other compute type it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=config.amp and config.amp_dtype == "float16")


def step_optimizer(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> bool:
    """Let the optimizer step; False if the scaler skipped it because of an infinite gradient."""
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() >= before  # lowered by a skipped step, and by nothing else


def clip_gradients(model: nn.Module, max_norm: float) -> None:
    """`torch.nn.utils.clip_grad_norm_` with the norm taken over active weights.

    Just before an update the layers give dense gradients, whose norm would shorten that step.
    """
    masks = {
        id(layer.weight): layer.mask
        for layer in model.modules()
        if isinstance(layer, (MaskedConv2d, MaskedLinear))
    }
    parameters = [p for p in model.parameters() if p.grad is not None]
    total = torch.nn.utils.get_total_norm(_active_gradients(parameters, masks))
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)


def _active_gradients(parameters: Iterable[nn.Parameter], masks: dict[int, Tensor]) -> list[Tensor]:
    gradients = []
    for parameter in parameters:
        assert parameter.grad is not None
        mask = masks.get(id(parameter))
        # Not a product: inf * 0 would be NaN.
        gradient = parameter.grad if mask is None else parameter.grad.masked_fill(~mask, 0.0)
        gradients.append(gradient)
    return gradients
