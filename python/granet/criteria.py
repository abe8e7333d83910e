"""What is dropped and what grows: criteria by name, and their functions.

A drop criterion says which active weights of each layer stay; a growth criterion gives every weight
a score, by whose magnitude inactive weights are chosen. Both see layers one by one: how many weights
each drops and regrows is decided elsewhere (:mod:`granet.redistribution`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from granet.placement import Part, Whole
from granet_kernels import pack_mask

Keep = Callable[[Whole, Sequence[Part], Sequence[int], torch.Generator], list[Tensor]]
"""From where the weights lie, their parts here, how many of each are dropped, and a generator for
whatever is random: the packed masks of the weights that stay."""


def keep_magnitude(
    place: Whole, parts: Sequence[Part], dropped: Sequence[int], generator: torch.Generator
) -> list[Tensor]:
    """Drop the smallest magnitudes (GraNet, RigL)."""
    weights, masks = _weights_and_masks(parts)
    return place.largest(weights, masks, _left(place, masks, dropped))


def keep_signs(
    place: Whole, parts: Sequence[Part], dropped: Sequence[int], generator: torch.Generator
) -> list[Tensor]:
    """Drop the same share of positive and of negative weights, of each those next to zero.

    The criterion of SET (Mocanu et al., 2018). A weight of exactly zero counts as positive. Where
    the shares are not whole numbers the negative weights give what is left over.
    """
    weights, masks = _weights_and_masks(parts)
    positive = [
        mask & pack_mask(~(weight < 0), like=weight)
        for weight, mask in zip(weights, masks, strict=True)
    ]
    negative = [mask & ~sign for mask, sign in zip(masks, positive, strict=True)]
    there = list(zip(place.counts_of(positive), place.counts_of(negative), dropped, strict=True))
    of_positive = [plus * count // max(plus + minus, 1) for plus, minus, count in there]
    of_negative = [count - part for part, count in zip(of_positive, dropped, strict=True)]
    kept = place.largest(weights, positive, _left(place, positive, of_positive))
    kept_negative = place.largest(weights, negative, _left(place, negative, of_negative))
    return [a | b for a, b in zip(kept, kept_negative, strict=True)]


def keep_random(
    place: Whole, parts: Sequence[Part], dropped: Sequence[int], generator: torch.Generator
) -> list[Tensor]:
    """Drop any, whatever their values."""
    _, masks = _weights_and_masks(parts)
    scores = [place.random_scores(part.param, generator) for part in parts]
    return place.largest(scores, masks, _left(place, masks, dropped))


DROP: Mapping[str, Keep] = {
    "magnitude": keep_magnitude,
    "sign": keep_signs,
    "random": keep_random,
}

GROWTH = ("gradient", "momentum", "random")
"""By the gradient of the step, by its running mean over some steps, or at random."""


def _weights_and_masks(parts: Sequence[Part]) -> tuple[list[Tensor], list[Tensor]]:
    return [part.weight for part in parts], [part.mask for part in parts]


def _left(place: Whole, masks: Sequence[Tensor], dropped: Sequence[int]) -> list[int]:
    return [count - gone for count, gone in zip(place.counts_of(masks), dropped, strict=True)]
