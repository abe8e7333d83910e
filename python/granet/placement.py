"""Where the weights of masked layers lie, and selection among all of them.

:class:`Whole` is the rule: every process has all of every weight. With ``fully_shard`` (FSDP2) a
process has some rows of each (:mod:`granet.sharded`). Whoever changes masks works on the
:class:`Part` of a weight that lies here, and asks the placement for whatever concerns all of them.

Selection is made of the operators of :mod:`granet_kernels` and leaves its inputs as they were. Masks
are packed, one bit a weight, in the storage order of their weight; so are those that are returned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from granet_kernels import (
    MaskedConv2d,
    MaskedLinear,
    count_active,
    masked_layers,
    pack_mask,
    pruned_masks,
)
from granet_kernels.layout import full_mask

Layer = MaskedConv2d | MaskedLinear


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What lies here of a layer's weight."""

    param: Tensor
    """The parameter, of the weight's full shape."""
    weight: Tensor
    """Its elements that lie here: the parameter itself, or a view of some of its rows."""
    mask: Tensor
    """Packed, of those elements."""


class Whole:
    """Every process has all of every weight."""

    is_whole = True

    def parts(self, layers: Iterable[Layer]) -> list[Part]:
        """Of these layers; the masks are the ones that the layers use."""
        return [Part(layer.weight, layer.weight, layer.bitmask.packed) for layer in layers]

    def publish(self, layers: Iterable[Layer], masks: Sequence[Tensor]) -> None:
        """Let layers have the masks of their parts, all of them."""
        for layer, mask in zip(layers, masks, strict=True):
            if layer.packed_mask is not mask:
                layer.packed_mask.copy_(mask)

    def local(self, tensor: Tensor) -> Tensor:
        """Elements of a parameter, its gradient or an optimizer state that lie here."""
        return tensor

    def rows(self, tensor: Tensor, param: Tensor) -> Tensor:
        """Elements that lie here of a tensor that has all, in the parameter's shape."""
        return tensor

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over all parts of what a tensor says of those here."""
        return tensor

    def nonzero(self, parts: Iterable[Part]) -> list[Tensor]:
        """Masks of the weights that are not zero."""
        return [pack_mask(part.weight.detach() != 0, like=part.weight) for part in parts]

    def counts_of(self, masks: Sequence[Tensor]) -> list[int]:
        """Active weights of each layer. Waits for the device."""
        counts: list[int] = self.total(count_active(masks)).tolist()
        return counts

    def largest(
        self, scores: Sequence[Tensor], masks: Sequence[Tensor], k: int | Sequence[int]
    ) -> list[Tensor]:
        """The masks of the ``k`` largest ``|scores|`` among what ``masks`` has.

        Args:
            scores: dense in memory, in the layout that their masks are for.
            masks: candidates.
            k: over all tensors together, or one count for each. Ties and NaN as in
                :func:`granet_kernels.prune_`.
        """
        return pruned_masks([score.detach() for score in scores], masks, k)

    def grow(
        self, scores: Sequence[Tensor], masks: Sequence[Tensor], counts: Sequence[int]
    ) -> list[Tensor]:
        """The masks with ``counts`` more weights each: those of largest ``|score|`` that they lack.

        NaN scores rank last, with zero.
        """
        candidates = [
            full_mask(score.numel(), mask.device) ^ mask
            for mask, score in zip(masks, scores, strict=True)
        ]
        ranked = [
            score.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf) for score in scores
        ]
        grown = self.largest(ranked, candidates, counts)
        return [mask | new for mask, new in zip(masks, grown, strict=True)]

    def counts_above_floor(
        self, scores: Sequence[Tensor], masks: Sequence[Tensor], k: int, floor: int
    ) -> list[int]:
        """Active weights of each layer if the ``k`` largest ``|scores|`` stay and no layer dies.

        Layers that the ``k`` largest would leave fewer than ``floor`` keep so many (or all they
        have), and the others share the rest by score.

        Raises:
            ValueError: ``k`` is less than the floors of all layers together.
        """
        active = self.counts_of(masks)
        lowest = [min(floor, count) for count in active]
        if k < sum(lowest):
            raise ValueError(
                f"sparsity: {k} active weights are fewer than the {sum(lowest)} that {len(lowest)} "
                "layers must keep"
            )
        counts = list(lowest)
        free = list(range(len(counts)))
        while free:
            left = k - sum(count for i, count in enumerate(lowest) if i not in free)
            chosen = self.largest([scores[i] for i in free], [masks[i] for i in free], left)
            found = dict(zip(free, self.counts_of(chosen), strict=True))
            free = [i for i in free if found[i] >= lowest[i]]
            if len(free) == len(found):
                for i, count in found.items():
                    counts[i] = count
                break
        return counts

    def random_scores(self, param: Tensor, generator: torch.Generator) -> Tensor:
        """Uniform in (0, 1], fp32, for the elements here; the same wherever a weight lies."""
        # 24 bits, and never zero: a score of zero could not be told from a missing one.
        bits = torch.randint(1, 2**24 + 1, param.shape, generator=generator, dtype=torch.int32)
        here = self.rows(bits.float() / 2**24, param)
        return torch.empty_like(self.local(param), dtype=torch.float32).copy_(here)


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """The masked layers of a model; of layers that share a weight, the first.

    Raises:
        ValueError: there are none.
    """
    layers = masked_layers(model)
    if not layers:
        raise ValueError(
            "model: expected masked layers in it, got none; call granet_kernels.sparsify(model)"
        )
    return layers


def check_optimizer(optimizer: torch.optim.Optimizer, layers: Mapping[str, Layer]) -> None:
    """Raise ValueError where an optimizer lacks a weight of a model's masked layers."""
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for name, layer in layers.items():
        if layer.weight.requires_grad and id(layer.weight) not in held:
            raise ValueError(
                f"optimizer: expected the parameters of model, got one without {name}.weight"
            )
