"""Weights in shards: a model under ``fully_shard`` (FSDP2), of which every rank has some rows.

Masks stay whole on every rank, at one bit a weight: 125 MB for a billion weights, 1.25 GB for ten
billion. Scores and weights are never gathered. To select, ranks count digits of the magnitudes' bits
and add up their counts, digit by digit (a radix selection); equal magnitudes go to the lower index,
and the rows of a rank lie behind those of the ranks before it. So given the same gradients the masks
are those of a single process, bit for bit. An update sends those counts (48 KB for each layer and
selection from fp32 values) and each mask once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from granet.placement import Layer, Part, Whole
from granet_kernels import pack_mask, unpack_mask

DIGIT_BITS = 11
"""Of a radix digit: 2048 counts for each selection, which a rank sends three times for fp32."""


def placement_of(layers: Mapping[str, Layer]) -> Whole:
    """Where the weights of these layers lie.

    Raises:
        ValueError: some lie in shards, but not all of them by rows over the same ranks.
    """
    shardings = {name: _sharding_of(name, layer.weight) for name, layer in layers.items()}
    found = [sharding for sharding in shardings.values() if sharding is not None]
    if not found:
        return Whole()
    for name, sharding in shardings.items():
        if sharding != found[0]:
            raise ValueError(
                f"model: expected {name}.weight in shards over the same ranks as the others, got "
                f"{'all of it on every rank' if sharding is None else 'other ranks'}; call "
                "fully_shard on the whole model too"
            )
    return Sharded(found[0])


@dataclass(frozen=True, slots=True)
class Sharding:
    """Ranks that share a weight's rows."""

    group: dist.ProcessGroup
    rank: int
    """This one, among them."""
    size: int

    def rows(self, count: int) -> slice:
        """Of so many rows those that lie here: as many on each rank, the last ones perhaps fewer."""
        each = -(-count // self.size)
        return slice(min(self.rank * each, count), min((self.rank + 1) * each, count))


def _sharding_of(name: str, weight: Tensor) -> Sharding | None:
    if not isinstance(weight, DTensor):
        return None
    sharded = [i for i, placement in enumerate(weight.placements) if not placement.is_replicate()]
    if len(sharded) != 1 or weight.placements[sharded[0]] != Shard(0):
        raise ValueError(
            f"model: expected {name}.weight in shards of rows, got it placed as {weight.placements}"
        )
    mesh, dim = weight.device_mesh, sharded[0]
    return Sharding(mesh.get_group(dim), mesh.get_local_rank(dim), mesh.size(dim))


class Sharded(Whole):
    """Every rank has some rows of every weight."""

    is_whole = False

    def __init__(self, sharding: Sharding) -> None:
        self._sharding = sharding
        self._masks: dict[int, tuple[int, Tensor]] = {}

    def parts(self, layers: Iterable[Layer]) -> list[Part]:
        return [Part(layer.weight, self.local(layer.weight), self._mask(layer)) for layer in layers]

    def _mask(self, layer: Layer) -> Tensor:
        """Of the rows here. Remembered: an optimizer's every step asks for it."""
        packed = layer.packed_mask
        version, mask = self._masks.get(id(packed), (-1, packed))
        if version != packed._version:
            here = self.rows(unpack_mask(packed, layer.weight.shape), layer.weight)
            mask = pack_mask(here.contiguous())
            self._masks[id(packed)] = packed._version, mask
        return mask

    def publish(self, layers: Iterable[Layer], masks: Sequence[Tensor]) -> None:
        for layer, mask in zip(layers, masks, strict=True):
            weight = layer.weight
            everywhere = torch.zeros(weight.shape, dtype=torch.bool, device=mask.device)
            here = self.rows(everywhere, weight)
            here.copy_(unpack_mask(mask, here.shape))
            packed = pack_mask(everywhere)
            dist.all_reduce(packed, group=self._sharding.group)  # no bit is set on two ranks
            layer.packed_mask.copy_(packed)

    def local(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        return DTensor.to_local(tensor.detach())  # type: ignore[arg-type]

    def rows(self, tensor: Tensor, param: Tensor) -> Tensor:
        return tensor[self._sharding.rows(param.shape[0])]

    def total(self, tensor: Tensor) -> Tensor:
        summed = tensor.clone()
        dist.all_reduce(summed, group=self._sharding.group)
        return summed

    def largest(
        self, scores: Sequence[Tensor], masks: Sequence[Tensor], k: int | Sequence[int]
    ) -> list[Tensor]:
        is_double = any(score.dtype == torch.float64 for score in scores)
        keys = [magnitude_bits(score.double() if is_double else score.float()) for score in scores]
        candidates = [unpack_mask(mask, key.shape) for mask, key in zip(masks, keys, strict=True)]
        together = isinstance(k, int)
        problem = [0] * len(keys) if together else list(range(len(keys)))
        wanted = torch.tensor([k] if isinstance(k, int) else list(k), device=masks[0].device)
        threshold, ties = self._threshold(keys, candidates, problem, wanted)
        allowed = self._ties_here(keys, candidates, problem, threshold, ties)
        chosen = []
        for i, (key, candidate) in enumerate(zip(keys, candidates, strict=True)):
            equal = candidate & (key == threshold[problem[i]])
            first = equal.cumsum(0) <= allowed[i]
            chosen.append(pack_mask((candidate & (key > threshold[problem[i]])) | (equal & first)))
        return chosen

    def _threshold(
        self,
        keys: Sequence[Tensor],
        candidates: Sequence[Tensor],
        problem: Sequence[int],
        wanted: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Of each problem the key of its last chosen element, and how many such keys are chosen."""
        bits = torch.iinfo(keys[0].dtype).bits - 1
        left, found = wanted.clone(), torch.zeros_like(wanted)
        digits_a_key = -(-bits // DIGIT_BITS)
        for shift in range((digits_a_key - 1) * DIGIT_BITS, -1, -DIGIT_BITS):
            counts = torch.zeros(
                len(wanted), 1 << DIGIT_BITS, dtype=torch.int64, device=left.device
            )
            for i, (key, candidate) in enumerate(zip(keys, candidates, strict=True)):
                same = candidate & ((key >> shift) >> DIGIT_BITS == found[problem[i]])
                digits = (key[same] >> shift) & ((1 << DIGIT_BITS) - 1)
                counts[problem[i]] += torch.bincount(digits, minlength=1 << DIGIT_BITS)
            dist.all_reduce(counts, group=self._sharding.group)
            from_above = counts.flip(1).cumsum(1)
            reached = from_above >= left.unsqueeze(1)
            # Where there are fewer than wanted the lowest digit, which takes them all.
            place = torch.where(reached.any(1), reached.int().argmax(1), counts.shape[1] - 1)
            digit = counts.shape[1] - 1 - place
            here = place.unsqueeze(1)
            left = left - (from_above.gather(1, here) - counts.flip(1).gather(1, here)).squeeze(1)
            found = (found << DIGIT_BITS) | digit
        # Of none at all no digit is the last one: then no key may be larger.
        return torch.where(wanted <= 0, torch.iinfo(keys[0].dtype).max, found), left.clamp(min=0)

    def _ties_here(
        self,
        keys: Sequence[Tensor],
        candidates: Sequence[Tensor],
        problem: Sequence[int],
        threshold: Tensor,
        ties: Tensor,
    ) -> Tensor:
        """How many of a tensor's keys that equal the threshold are chosen on this rank."""
        own = torch.stack(
            [
                (candidate & (key == threshold[problem[i]])).sum()
                for i, (key, candidate) in enumerate(zip(keys, candidates, strict=True))
            ]
        )
        everyone = [torch.empty_like(own) for _ in range(self._sharding.size)]
        dist.all_gather(everyone, own, group=self._sharding.group)
        in_order = torch.stack(everyone, 1)  # tensors, then ranks: the order of the indices
        allowed = torch.empty_like(own)
        for number in set(problem):
            mine = [i for i, other in enumerate(problem) if other == number]
            counts = in_order[mine].view(-1)
            before = counts.cumsum(0) - counts
            taken = (ties[number] - before).clamp(min=0).minimum(counts).view(len(mine), -1)
            allowed[mine] = taken[:, self._sharding.rank]
        return allowed


def magnitude_bits(values: Tensor) -> Tensor:
    """1-D integers in the order of ``|values|``, fp32 or fp64, NaN above all: their bits without the sign."""
    is_double = values.dtype == torch.float64
    integers = torch.int64 if is_double else torch.int32
    bits = values.detach().contiguous().view(-1).view(integers) & torch.iinfo(integers).max
    infinity = 0x7FF << 52 if is_double else 0xFF << 23
    return bits.clamp(max=infinity + 1)  # one NaN is as good as another
