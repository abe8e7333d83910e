"""``official_rounding=True`` against the published rules, weight for weight over a thousand steps.

The other side masks, prunes, drops and regrows as the published code is described to
(:class:`bench.published.PublishedMasking`); the times, the ramp and the drop fraction are written
here from the same rules. Each side trains its own copy of the network by its own masks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.published import PublishedMasking
from granet import METHODS
from granet_kernels import densify, sparsify

STEPS, EVERY, SPARSITY, INITIAL = 1000, 20, 0.9, 0.5
RAMP_UPDATES = STEPS // 2 // EVERY


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.Flatten(), nn.Linear(12, 5)
    )
    return model.double()  # so that sums in another order do not decide what is pruned


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(16, 2, 8, 8, generator=generator, dtype=torch.float64)
    return images, (images.sum((1, 2, 3)).abs() * 10).long() % 5


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)


def ramp(update: int, initial: float) -> float:
    """Density d_i to d_f over the updates 0 to n, and the last prune at n - 1."""
    d_i, d_f = 1 - initial, 1 - SPARSITY
    return (1 - d_i) + (d_i - d_f) * (1 - (1 - update / RAMP_UPDATES) ** 3)


def annealed(step: int) -> float:
    return 0.005 + (0.5 - 0.005) / 2 * (1 + math.cos(math.pi * step / STEPS))


def rigl_fraction(step: int) -> float:
    return 0.3 / 2 * (1 + math.cos(math.pi * step / (0.75 * STEPS)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """A method by the published description."""

    settings: dict[str, Any]
    initial: float
    prunes: bool
    drop_fraction: Callable[[int], float] | None = None
    last_update: int = STEPS

    def update(self, published: PublishedMasking, step: int) -> None:
        if step % EVERY or step > self.last_update:
            return
        if self.prunes and step // EVERY <= RAMP_UPDATES - 1:
            published.prune(ramp(step // EVERY, self.initial))
        if self.drop_fraction is not None:
            published.drop_and_regrow(self.drop_fraction(step))
        published.apply_masks()


METHOD_RULES = {
    "granet": Rules(
        settings={"initial_sparsity": INITIAL, "prune_until": "50%"},
        initial=INITIAL,
        prunes=True,
        drop_fraction=annealed,
    ),
    "gmp": Rules(settings={"prune_until": "50%"}, initial=0.0, prunes=True),
    "rigl": Rules(
        settings={}, initial=SPARSITY, prunes=False, drop_fraction=rigl_fraction, last_update=750
    ),
    "rigl-itop": Rules(settings={}, initial=SPARSITY, prunes=False, drop_fraction=annealed),
}


@pytest.mark.parametrize("name", METHOD_RULES)
def test_a_thousand_steps_are_those_of_the_published_rules(name: str) -> None:
    rules = METHOD_RULES[name]
    model = sparsify(network())
    optimizer = sgd(model)
    sparsifier = METHODS[name](
        model,
        optimizer,
        sparsity=SPARSITY,
        total_steps=STEPS,
        update_every=EVERY,
        official_rounding=True,
        **rules.settings,
    )  # type: ignore[call-arg]
    theirs = densify(copy.deepcopy(model))
    their_optimizer = sgd(theirs)
    weights = [module.weight for module in theirs if hasattr(module, "weight")]
    masks = [layer.mask for layer in sparsifier.layers.values()]
    published = PublishedMasking(weights, their_optimizer, masks)
    for step in range(STEPS):
        images, labels = batch(step)
        for net in (model, theirs):
            nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
        sparsifier.step()
        their_optimizer.step()
        published.apply_masks()
        rules.update(published, step + 1)
        for (layer_name, layer), mask in zip(
            sparsifier.layers.items(), published.masks, strict=True
        ):
            assert torch.equal(layer.mask, mask.bool()), (step + 1, layer_name)
        optimizer.zero_grad()
        their_optimizer.zero_grad()
    for layer, weight in zip(sparsifier.layers.values(), weights, strict=True):
        torch.testing.assert_close(layer.weight, weight, rtol=1e-9, atol=1e-12)
    updates = STEPS // EVERY
    assert sum(sparsifier.active_counts()) < 0.12 * sparsifier.numel or updates == 0
