"""Whole networks, dense and sparse, as contenders for inference and for training steps."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import granet_kernels
from bench.cpu.layers import FORMATS, WITHOUT_WEIGHTS
from bench.cpu.race import Contender, Run, whole
from bench.cpu.shapes import ConvShape
from bench.cpu.targets import DENSE
from granet.distributions import layer_budgets
from granet.models import create_model
from granet_kernels import MaskedConv2d, MaskedSGD, masked_layers, sparsify

Task = Literal["inference", "training step"]
TRAINING_STEP: Task = "training step"
SGD = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
MASKS = ("uniform", "erk")
SPARSIFIED, COMPRESSED = "sparsify", "compress"
MANY_PIXELS = 100_000
"""Of a batch that takes too long to be run more often than it must be."""
DENSE_ENDS = ("conv1", "fc")
"""What uniform masks leave dense, as is usual with them (and as SparseProp's figures were taken)."""


@dataclass(frozen=True, slots=True)
class Network:
    """A network by granet's name for it, and the images it gets."""

    title: str
    name: str
    classes: int
    side: int
    batch: int

    def __str__(self) -> str:
        return f"{self.title}, {self.side}x{self.side}, batch {self.batch}"

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return create_model(self.name, num_classes=self.classes)

    def data(self, memory_format: str) -> tuple[Tensor, Tensor]:
        """Images in a memory format, and labels; the same for every contender."""
        g = torch.Generator().manual_seed(1)
        images = torch.randn(self.batch, 3, self.side, self.side, generator=g)
        labels = torch.randint(self.classes, (self.batch,), generator=g)
        return images.contiguous(memory_format=FORMATS[memory_format]), labels


RESNET18 = Network("ResNet-18", "resnet18_cifar", 10, 32, 64)
RESNET50 = Network("ResNet-50", "resnet50", 1000, 224, 16)
RESNET50_ALONE = Network("ResNet-50", "resnet50", 1000, 224, 1)
QUICK_RESNET18 = Network("ResNet-18", "resnet18_cifar", 10, 32, 8)


def sparse_model(network: Network, sparsity: float, masks: str) -> nn.Module:
    """Random masks. Uniform ones leave the stem and the classifier dense; ERK has every layer, and
    decides by itself what is dense.
    """
    model = sparsify(network.build(), exclude=DENSE_ENDS if masks == "uniform" else ())
    layers = list(masked_layers(model).values())
    shapes = [tuple(layer.weight.shape) for layer in layers]
    g = torch.Generator().manual_seed(2)
    for layer, budget in zip(layers, layer_budgets(shapes, sparsity, masks), strict=True):
        share = budget / math.prod(layer.weight.shape)
        layer.mask = torch.rand(layer.weight.shape, generator=g) < share  # type: ignore[assignment]
    return model


def role(name: str, sparsity: float, masks: str) -> str:
    return f"{name}, {masks} {sparsity:g}"


def our_names(task: Task) -> tuple[str, ...]:
    """The ways in which a network of ours does the task."""
    has_compress = hasattr(granet_kernels, COMPRESSED)
    return (SPARSIFIED, COMPRESSED) if task == "inference" and has_compress else (SPARSIFIED,)


def contenders(
    network: Network,
    task: Task,
    sparsities: Sequence[float],
    format_of: Callable[[str, float, str], str],
) -> list[Contender]:
    """Dense in all its variants, and every sparse model in its `format_of(name, sparsity, masks)`."""
    prepare = _inference if task == "inference" else _training
    dense: dict[str, Callable[[], Run]] = {
        name: functools.partial(_dense, network, prepare, name, False) for name in FORMATS
    }
    if task == "inference":
        dense |= {
            f"{name}, norms folded": functools.partial(_dense, network, prepare, name, True)
            for name in FORMATS
        }
    entered = [Contender(role=DENSE, variant=v, build=build) for v, build in dense.items()]
    for masks in MASKS:
        for sparsity in sparsities:
            for name in our_names(task):
                memory_format = format_of(name, sparsity, masks)
                build = functools.partial(
                    sparse_run, network, task, sparsity, masks, memory_format, name
                )
                entered.append(
                    Contender(role=role(name, sparsity, masks), variant=memory_format, build=build)
                )
    return entered


def without_weights(network: Network, memory_format: str) -> Contender:
    """Training steps of the uniformly sparse network: all but what active weights add."""

    def build() -> Run:
        model = sparsify(network.build(), exclude=DENSE_ENDS)
        for layer in masked_layers(model).values():
            layer.mask = torch.zeros_like(layer.weight, dtype=torch.bool)  # type: ignore[assignment]
        return _training(network, model, memory_format, MaskedSGD)

    return Contender(role=WITHOUT_WEIGHTS, variant=memory_format, build=build)


@functools.cache
def sparse_convolutions(network: Network) -> tuple[ConvShape, ...]:
    """The layers that uniform masks make sparse."""
    model = sparsify(network.build(), exclude=DENSE_ENDS).eval()
    shapes = []

    def note(layer: nn.Module, inputs: tuple[Tensor], _: object) -> None:
        assert isinstance(layer, MaskedConv2d)
        (images,) = inputs
        geometry = images.size(-1), layer.kernel_size[0], layer.stride[0]
        shapes.append(ConvShape(layer.in_channels, layer.out_channels, *geometry, network.batch))

    for layer in masked_layers(model).values():
        layer.register_forward_hook(note)
    with torch.inference_mode():
        model(torch.zeros(1, 3, network.side, network.side))
    return tuple(shapes)


@functools.cache
def faster_format(
    network: Network, task: Task, threads: int, name: str, sparsity: float, masks: str
) -> str:
    """The memory format in which a sparse network is faster: dense has the choice too.

    ERK masks leave many layers to the dense kernels, which want channels_last; ours mostly do not.
    """
    runs = {f: sparse_run(network, task, sparsity, masks, f, name) for f in FORMATS}
    for run in runs.values():
        run()
    rounds = 3 if network.batch * network.side**2 < MANY_PIXELS else 1
    seconds = dict.fromkeys(runs, math.inf)
    for _ in range(rounds):
        for memory_format, run in runs.items():
            seconds[memory_format] = min(seconds[memory_format], sum(run().values()))
    return min(seconds, key=seconds.__getitem__)


def sparse_run(
    network: Network, task: Task, sparsity: float, masks: str, memory_format: str, name: str
) -> Run:
    """One of ours, ready to run."""
    model = sparse_model(network, sparsity, masks)
    if name == COMPRESSED:
        model = granet_kernels.compress(model.eval())
    if task == "inference":
        return _inference(network, model, memory_format)
    return _training(network, model, memory_format, MaskedSGD)


Prepare = Callable[[Network, nn.Module, str], Run]


def _dense(network: Network, prepare: Prepare, memory_format: str, folded: bool) -> Run:
    model = network.build()
    return prepare(network, fuse(model.eval()) if folded else model, memory_format)


def dense_run(network: Network, task: Task, memory_format: str) -> Run:
    """The dense network, ready to run."""
    prepare = _inference if task == "inference" else _training
    return _dense(network, prepare, memory_format, False)


def _inference(network: Network, model: nn.Module, memory_format: str) -> Run:
    model = model.eval().to(memory_format=FORMATS[memory_format])
    images, _ = network.data(memory_format)

    def call() -> None:
        with torch.inference_mode():
            model(images)

    return whole("inference", call)


def _training(
    network: Network,
    model: nn.Module,
    memory_format: str,
    optimizer_type: type[torch.optim.SGD] | None = None,
) -> Run:
    """Forward, backward, optimizer step: torch's fused one unless it is ours."""
    model = model.train().to(memory_format=FORMATS[memory_format])
    images, labels = network.data(memory_format)
    optimizer = (optimizer_type or torch.optim.SGD)(model.parameters(), fused=True, **SGD)

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return whole("training step", step)
