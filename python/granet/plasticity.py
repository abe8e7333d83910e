"""`granet plasticity`: how well a network recovers from being pruned, and what regeneration adds.

The measurement of the GraNet paper (NeurIPS 2021, section 3). A dense network is trained; at chosen
epochs copies of it are pruned once, at chosen rates and by chosen criteria, and trained on twice:

    at the learning rate in force, for some epochs    plasticity = accuracy then - accuracy before
                                                                   the prune
    on what is left of the schedule                   final plasticity = accuracy at the end - the
                                                                   dense network's at the end

With regeneration a pruned copy exchanges a share of its weights at once, as an update of GraNet does:
the smallest are dropped, as many grow where the gradient of the next batch is largest, and the
sparsity stays. Accuracies are of the test images, in percent; nothing is chosen by them.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from granet.distributions import active_budget
from granet.placement import layers_of
from granet.topology import Exchange, Topology
from granet.training import build
from granet.training.config import TrainConfig
from granet.training.passes import Passes
from granet_kernels import sparsify


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One pruned copy."""

    epoch: int
    """Epochs that the dense network had been trained when it was copied."""
    lr: float
    """Learning rate in force."""
    rate: float
    """Share of the weights that was pruned."""
    criterion: str
    """A key of `CRITERIA`."""
    regenerated: bool
    """Whether weights were exchanged after the prune."""
    sparsity: float
    """Counted in the masks."""
    accuracy_before: float
    """Of the dense network at that epoch."""
    accuracy_recovered: float
    """After training on at this learning rate."""
    plasticity: float
    """The difference of these two, in points."""
    accuracy_dense: float
    """Of the dense network at the end of its training."""
    accuracy_final: float
    """Of the copy after the rest of the schedule."""
    final_plasticity: float
    """The difference of these two, in points."""


def prune_uniform(topology: Topology, rate: float) -> None:
    """The smallest magnitudes of each layer."""
    numels = [param.numel() for param in topology.params]
    topology.prune([max(active_budget(rate, numel), 1) for numel in numels])


def prune_global(topology: Topology, rate: float) -> None:
    """The smallest magnitudes of the network; each layer keeps one."""
    numel = sum(param.numel() for param in topology.params)
    topology.prune(active_budget(rate, numel), floor=1)


def prune_filters(topology: Topology, rate: float) -> None:
    """In each layer the output channels of smallest sum of magnitudes; one is kept."""
    masks = {}
    for name, layer in topology.layers.items():
        norms = layer.weight.detach().flatten(1).abs().sum(1)
        kept = norms.topk(max(active_budget(rate, len(norms)), 1)).indices
        rows = torch.zeros(len(norms), dtype=torch.bool, device=norms.device).index_fill_(
            0, kept, True
        )
        masks[name] = rows.view(-1, *[1] * (layer.weight.dim() - 1)).expand_as(layer.weight)
    topology.set_masks(masks)


def prune_random(topology: Topology, rate: float) -> None:
    """Any weights of each layer."""
    topology.randomize([max(active_budget(rate, p.numel()), 1) for p in topology.params])


CRITERIA: Mapping[str, Callable[[Topology, float], None]] = {
    "uniform": prune_uniform,
    "global": prune_global,
    "filter": prune_filters,
    "random": prune_random,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """What is measured.

    Raises:
        ValueError: a value is out of range; names it.
    """

    epochs: tuple[int, ...]
    """At which copies are pruned; 0 is the initialisation."""
    rates: tuple[float, ...]
    criteria: tuple[str, ...] = ("uniform", "global")
    regeneration: tuple[bool, ...] = (False, True)
    recover_epochs: int = 30
    """Epochs at the learning rate in force."""
    drop_fraction: float = 0.5
    """Share of the active weights that regeneration exchanges."""

    def __post_init__(self) -> None:
        for rate in self.rates:
            if not 0 < rate < 1:
                raise ValueError(f"rates: expected numbers in (0, 1), got {rate}")
        for criterion in self.criteria:
            if criterion not in CRITERIA:
                known = ", ".join(CRITERIA)
                raise ValueError(f"criteria: expected some of {known}, got {criterion!r}")
        if self.recover_epochs < 1:
            raise ValueError(f"recover_epochs: expected at least 1, got {self.recover_epochs}")
        if not 0 <= self.drop_fraction <= 1:
            raise ValueError(
                f"drop_fraction: expected a number in [0, 1], got {self.drop_fraction}"
            )


class Network:
    """A network in training, by hand: epoch by epoch, at whatever learning rate is asked for."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.device = build.choose_device(config.device)
        build.seed_everything(config)
        self.source = build.build_source(config, self.device)
        self.batches = build.usable_batches(config, self.source.steps_per_epoch)
        self.model = sparsify(build.build_model(config, self.source, self.device))
        self.optimizer = build.build_optimizer(config, self.model)
        self.scaler = build.build_scaler(config, self.device)
        mix = build.build_mix(config, self.source.num_classes)
        self.passes = Passes(config, self.model, self.device, mix=mix)
        steps = self.batches // config.grad_accum_steps
        scheduler = build.build_scheduler(config, self.optimizer, config.epochs * steps)
        self._factor = scheduler.lr_lambdas[0]
        self._steps_per_epoch = steps

    def lr(self, step: int) -> float:
        """Of the schedule."""
        return self.config.lr * float(self._factor(step))

    def first_step(self, epoch: int) -> int:
        """Steps before an epoch, from 0."""
        return epoch * self._steps_per_epoch

    def train(self, epoch: int, *, lr: float | None = None) -> None:
        """One epoch, at a learning rate or that of the schedule."""
        torch.manual_seed(self.config.seed + epoch)  # of dropout: the same whatever went before
        self.model.train()
        batches = self.source.train_batches(epoch)
        for step in range(self._steps_per_epoch):
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr(self.first_step(epoch) + step) if lr is None else lr
            group_of = itertools.islice(batches, self.config.grad_accum_steps)
            self.passes.step(group_of, lambda *_: None, self.optimizer, self.scaler)
            self.optimizer.zero_grad()

    def accuracy(self) -> float:
        """On the test images, in percent."""
        return self.passes.evaluate(self.source.test_batches())[1]

    def state(self) -> dict[str, Any]:
        """A copy of all that training changes."""
        return copy.deepcopy(
            {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        )

    def restore(self, state: Mapping[str, Any]) -> None:
        """Return to a state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))

    def prune(self, rate: float, criterion: str, exchanged: float, epoch: int) -> float:
        """Prune, exchange a share of what is left, and return the sparsity."""
        generator = torch.Generator().manual_seed(self.config.seed)
        topology = Topology(layers_of(self.model), self.optimizer, generator)
        with torch.no_grad():
            CRITERIA[criterion](topology, rate)
        if exchanged:
            scores = self._gradients(epoch)
            with torch.no_grad():
                topology.exchange(exchanged, scores, Exchange())
        return 1 - sum(topology.counts()) / sum(param.numel() for param in topology.params)

    def _gradients(self, epoch: int) -> dict[str, Tensor]:
        """Of all weights, from the first batch; by a copy, whose statistics may change."""
        model = copy.deepcopy(self.model).train()
        layers = layers_of(model)
        for layer in layers.values():
            layer.dense_grad.fill_(True)
        images, labels = next(self.source.train_batches(epoch))
        images = images.to(memory_format=build.memory_format(self.config))
        F.cross_entropy(model(images), labels, label_smoothing=self.config.smoothing).backward()
        return {n: m.weight.grad for n, m in layers.items() if m.weight.grad is not None}


def measure(
    config: TrainConfig, study: Study, report: Callable[[str], object] = lambda line: None
) -> Iterator[Measurement]:
    """Train the dense network, then prune and retrain its copies, one after another.

    Raises:
        ValueError: an epoch is not one of the run.
    """
    for epoch in study.epochs:
        if not 0 <= epoch < config.epochs:
            raise ValueError(
                f"prune_epochs: expected epochs from 0 to {config.epochs - 1}, got {epoch}"
            )
    network = Network(config)
    copies: dict[int, tuple[dict[str, Any], float]] = {}
    for epoch in range(config.epochs):
        if epoch in study.epochs:
            copies[epoch] = network.state(), network.accuracy()
        network.train(epoch)
    dense = network.accuracy()
    report(f"dense: {dense:.2f} % after {config.epochs} epochs")
    for epoch, rate, criterion, regenerated in itertools.product(
        study.epochs, study.rates, study.criteria, study.regeneration
    ):
        state, before = copies[epoch]
        lr = network.lr(network.first_step(epoch))
        exchanged = study.drop_fraction if regenerated else 0.0
        network.restore(state)
        sparsity = network.prune(rate, criterion, exchanged, epoch)
        pruned = network.state()
        for later in range(epoch, epoch + study.recover_epochs):
            network.train(later, lr=lr)
        recovered = network.accuracy()
        network.restore(pruned)
        for later in range(epoch, config.epochs):
            network.train(later)
        final = network.accuracy()
        yield Measurement(
            epoch=epoch,
            lr=lr,
            rate=rate,
            criterion=criterion,
            regenerated=regenerated,
            sparsity=sparsity,
            accuracy_before=before,
            accuracy_recovered=recovered,
            plasticity=recovered - before,
            accuracy_dense=dense,
            accuracy_final=final,
            final_plasticity=final - dense,
        )


def plot(measurements: Sequence[Measurement], path: Path) -> None:
    """Both metrics against the epoch: a colour a rate, a marker a criterion, dashed without regeneration."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    rates = sorted({m.rate for m in measurements})
    criteria = sorted({m.criterion for m in measurements}, key=list(CRITERIA).index)
    panels = figure.subplots(1, 2)
    for axes, name in zip(panels, ("plasticity", "final_plasticity"), strict=True):
        for rate, criterion, regenerated in itertools.product(rates, criteria, (True, False)):
            points = sorted(
                (m.epoch, getattr(m, name))
                for m in measurements
                if (m.rate, m.criterion, m.regenerated) == (rate, criterion, regenerated)
            )
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=f"C{rates.index(rate)}",
                    marker="osx^"[criteria.index(criterion)],
                    linestyle="-" if regenerated else "--",
                    label=f"{rate:g} {criterion}{', regenerated' if regenerated else ''}",
                )
        axes.axhline(0, color="0.7", linewidth=0.8)
        axes.set_xlabel("epoch of the prune")
        axes.set_ylabel(name.replace("_", " ") + " (points)")
    panels[0].legend(fontsize="small")
    figure.savefig(path)
