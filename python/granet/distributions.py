"""How many weights of each layer stay active.

Fractions are shares of *active* weights in (0, 1], one for each layer. Budgets are integers: they
sum to the target exactly, whatever the fractions round to. Pure Python, no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

Shape = Sequence[int]
Distribution = Callable[[Sequence[Shape], float], list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ErkSolution:
    """What the ERK rule gives for a list of layers."""

    fractions: tuple[float, ...]
    """Share of active weights of each layer."""
    dense: tuple[int, ...]
    """Indices of the layers that the rule leaves dense, ascending."""
    epsilon: float
    """Scale of the other layers: fraction = epsilon * sum(dims) / prod(dims). 0 if none is left."""


def solve_erk(
    shapes: Sequence[Shape], sparsity: float, *, power: float = 1.0, kernel: bool = True
) -> ErkSolution:
    """Erdos-Renyi-Kernel fractions with the numbers behind them.

    A layer's share of active weights is proportional to sum(dims) / prod(dims) over all its
    dimensions, kernel included (Evci et al., 2020, section 3). While the largest share exceeds 1,
    all layers that have it become dense and epsilon is solved for again, so that the shares keep
    the overall sparsity.

    Args:
        shapes: one weight shape for each layer, all dimensions positive.
        sparsity: overall fraction of inactive weights, in [0, 1).
        power: of the quotient, at least 0: 0 is uniform, 1 the published rule.
        kernel: whether the kernel's dimensions count; without them it is the plain Erdos-Renyi
            rule (Mocanu et al., 2018), which knows output and input channels only.

    Raises:
        ValueError: `sparsity`, `power` or a shape is out of range.
    """
    _check_sparsity(sparsity)
    if not 0 <= power < math.inf:
        raise ValueError(f"power: expected a number of at least 0, got {power}")
    numels = [_numel(index, shape) for index, shape in enumerate(shapes)]
    raw = [_quotient(shape if kernel else shape[:2]) ** power for shape in shapes]
    if sparsity == 0:
        # Floats would leave the layer of the smallest share a rounding error short of 1.
        return ErkSolution(fractions=(1.0,) * len(raw), dense=tuple(range(len(raw))), epsilon=0.0)
    dense: set[int] = set()
    epsilon = 0.0
    while len(dense) < len(raw):
        free = [index for index in range(len(raw)) if index not in dense]
        epsilon = _erk_epsilon(raw, numels, free, sparsity)
        largest = max(raw[index] for index in free)
        if largest * epsilon <= 1:
            break
        dense.update(index for index in free if raw[index] == largest)
        epsilon = 0.0
    fractions = tuple(1.0 if i in dense else epsilon * share for i, share in enumerate(raw))
    return ErkSolution(fractions=fractions, dense=tuple(sorted(dense)), epsilon=epsilon)


def _quotient(dims: Shape) -> float:
    return sum(dims) / math.prod(dims)


def _erk_epsilon(
    raw: Sequence[float], numels: Sequence[int], free: Sequence[int], sparsity: float
) -> float:
    """The scale at which the free layers hold what the dense ones leave of the active weights."""
    free_numel = sum(numels[index] for index in free)
    dense_numel = sum(numels) - free_numel
    active = active_fraction(sparsity) * free_numel - sparsity * dense_numel
    return active / math.fsum(raw[index] * numels[index] for index in free)


def erk(shapes: Sequence[Shape], sparsity: float) -> list[float]:
    """Share of active weights of each layer by the ERK rule; see `solve_erk`."""
    return list(solve_erk(shapes, sparsity).fractions)


def er(shapes: Sequence[Shape], sparsity: float) -> list[float]:
    """The same by the Erdos-Renyi rule, which leaves the kernel's size out."""
    return list(solve_erk(shapes, sparsity, kernel=False).fractions)


def uniform(shapes: Sequence[Shape], sparsity: float) -> list[float]:
    """The same share of active weights, 1 - sparsity, for every layer."""
    _check_sparsity(sparsity)
    for index, shape in enumerate(shapes):
        _numel(index, shape)
    return [active_fraction(sparsity)] * len(shapes)


DISTRIBUTIONS: Mapping[str, Distribution] = {"erk": erk, "er": er, "uniform": uniform}
"""Rules by name."""


@dataclass(frozen=True, slots=True)
class ScaledErk:
    """The ERK rule with its quotient raised to a power: below 1 closer to uniform."""

    power: float

    def __call__(self, shapes: Sequence[Shape], sparsity: float) -> list[float]:
        return list(solve_erk(shapes, sparsity, power=self.power).fractions)


@dataclass(frozen=True, slots=True)
class Explicit:
    """A sparsity for each layer, in the order of the layers, as given.

    On the way there (a ramp, an initial sparsity) all layers hold their share of the active
    weights in these proportions, as far as their sizes allow.
    """

    sparsities: tuple[float, ...]

    def __call__(self, shapes: Sequence[Shape], sparsity: float) -> list[float]:
        if len(shapes) != len(self.sparsities):
            raise ValueError(
                f"distribution: expected a sparsity for each of {len(shapes)} layers, got "
                f"{len(self.sparsities)}"
            )
        for value in self.sparsities:
            _check_sparsity(value)
        return [active_fraction(value) for value in self.sparsities]

    def check(self, shapes: Sequence[Shape], sparsity: float) -> None:
        """Raise ValueError where the layers' sparsities are not those of a network of ``sparsity``."""
        numels = [math.prod(shape) for shape in shapes]
        fractions = self(shapes, sparsity)
        active = math.fsum(f * n for f, n in zip(fractions, numels, strict=True))
        # A rounded weight for each layer.
        if abs(active - active_budget(sparsity, sum(numels))) > len(shapes):
            raise ValueError(
                f"distribution: expected sparsities of layers that make {sparsity}, got "
                f"{1 - active / sum(numels):.4f}"
            )


def distribution_of(rule: str | Distribution) -> Distribution:
    """A rule by its name; a rule itself is returned as it is.

    Raises:
        ValueError: no rule has this name.
    """
    if callable(rule):
        return rule
    if rule not in DISTRIBUTIONS:
        known = ", ".join(DISTRIBUTIONS)
        raise ValueError(f"distribution: expected one of {known}, got {rule!r}")
    return DISTRIBUTIONS[rule]


def active_fraction(sparsity: float) -> float:
    """1 - sparsity in decimals: 0.1 for 0.9, as one would type it, not 0.09999999999999998."""
    return float(1 - Fraction(repr(float(sparsity))))


def active_budget(sparsity: float, numel: int) -> int:
    """Active weights among `numel` at `sparsity`: numel - round(numel * sparsity)."""
    _check_sparsity(sparsity)
    return numel - round(numel * sparsity)


def apportion(
    fractions: Sequence[float],
    numels: Sequence[int],
    total: int,
    caps: Sequence[int] | None = None,
    floor: int = 1,
) -> list[int]:
    """Integer budgets n_l near fractions[l] * numels[l] that sum to `total` exactly.

    Where the fractions themselves sum to `total` but for rounding, each n_l is one of the two
    integers at its ideal; otherwise the ideals are first scaled by a common factor, cut to the
    bounds. The units left over go to the largest remainders, ties to the lower index.

    Args:
        fractions: wanted share of active weights for each layer, at least 0.
        numels: weights of each layer.
        total: active weights over all layers.
        caps: most active weights of each layer, in [0, numel]; default `numels`.
        floor: fewest active weights of a layer. A smaller cap takes precedence over it.

    Raises:
        ValueError: lengths or ranges do not fit, or no budgets meet `total`; the message then
            names the largest (or smallest) sparsity that the layers can meet.
    """
    high = list(numels if caps is None else caps)
    _check_layers(fractions, numels, high, floor)
    low = [min(floor, cap) for cap in high]
    _check_feasible(total, sum(numels), low, high)
    # Decimals as written: 0.1 of 10 and 0.1 of 20 tie exactly, 0.29 of 100 is 29.
    wanted = [Fraction(repr(float(f))) * n for f, n in zip(fractions, numels, strict=True)]
    bounds = zip(wanted, map(Fraction, low), map(Fraction, high), strict=True)
    ideals = [min(max(ideal, lowest), highest) for ideal, lowest, highest in bounds]
    if abs(sum(ideals, Fraction(0)) - total) >= 1:
        ideals = _fill(wanted, numels, total, low, high)
    budgets = [math.floor(ideal) for ideal in ideals]
    # There are never more units than remainders above 0, so no budget passes its cap.
    by_remainder = sorted(range(len(budgets)), key=lambda index: budgets[index] - ideals[index])
    for index in by_remainder[: total - sum(budgets)]:
        budgets[index] += 1
    return budgets


def _fill(
    wanted: Sequence[Fraction],
    numels: Sequence[int],
    total: int,
    low: Sequence[int],
    high: Sequence[int],
) -> list[Fraction]:
    """Ideals proportional to `wanted`, cut to [low, high], that sum to `total`.

    Layers over their cap free budget for the others, layers under their floor take some. Only the
    side with the larger excess is certain to stay at its bound under the final scale, so each
    round settles that side and solves again for the rest.
    """
    ideals = [Fraction(0) for _ in wanted]
    free = list(range(len(wanted)))
    while free:
        left = total - sum(ideals, Fraction(0))
        weights = {index: wanted[index] for index in free}
        if not any(weights.values()):  # only layers that asked for nothing can take the rest
            weights = {index: Fraction(numels[index]) for index in free}
        scale = left / sum(weights.values(), Fraction(0))
        trial = {index: scale * weight for index, weight in weights.items()}
        over = [index for index in free if trial[index] > high[index]]
        under = [index for index in free if trial[index] < low[index]]
        if not over and not under:
            for index in free:
                ideals[index] = trial[index]
            break
        excess = sum(trial[index] - high[index] for index in over)
        lack = sum(low[index] - trial[index] for index in under)
        settled, bound = (over, high) if excess >= lack else (under, low)
        for index in settled:
            ideals[index] = Fraction(bound[index])
        free = [index for index in free if index not in settled]
    return ideals


def layer_budgets(
    shapes: Sequence[Shape],
    sparsity: float,
    distribution: str | Distribution,
    caps: Sequence[int] | None = None,
    floor: int = 1,
) -> list[int]:
    """Active weights of each layer: they sum to ``active_budget(sparsity, numel)``.

    Args:
        shapes: one weight shape for each layer.
        sparsity: overall fraction of inactive weights, in [0, 1).
        distribution: a key of `DISTRIBUTIONS`, or a rule like those.
        caps: most active weights of each layer; default its number of weights.
        floor: fewest active weights of a layer that has as many.

    Raises:
        ValueError: an argument is out of range, or the layers cannot meet `sparsity`.
    """
    fractions = distribution_of(distribution)(shapes, sparsity)
    numels = [math.prod(shape) for shape in shapes]
    return apportion(fractions, numels, active_budget(sparsity, sum(numels)), caps, floor)


def _numel(index: int, shape: Shape) -> int:
    if len(shape) == 0 or min(shape) < 1:
        raise ValueError(f"shapes[{index}]: expected positive dimensions, got {tuple(shape)}")
    return math.prod(shape)


def _check_sparsity(sparsity: float) -> None:
    is_number = isinstance(sparsity, int | float) and not isinstance(sparsity, bool)
    if not is_number or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity: expected a number in [0, 1), got {sparsity!r}")


def _check_layers(
    fractions: Sequence[float], numels: Sequence[int], caps: Sequence[int], floor: int
) -> None:
    if len(fractions) != len(numels):
        raise ValueError(f"fractions: expected {len(numels)} of them, got {len(fractions)}")
    if len(caps) != len(numels):
        raise ValueError(f"caps: expected {len(numels)} of them, got {len(caps)}")
    if floor < 0:
        raise ValueError(f"floor: expected an integer of at least 0, got {floor}")
    for index, (fraction, numel, cap) in enumerate(zip(fractions, numels, caps, strict=True)):
        if numel < 1:
            raise ValueError(f"numels[{index}]: expected an integer of at least 1, got {numel}")
        if not 0 <= fraction < math.inf:
            raise ValueError(f"fractions[{index}]: expected a number >= 0, got {fraction}")
        if not 0 <= cap <= numel:
            raise ValueError(f"caps[{index}]: expected an integer in [0, {numel}], got {cap}")


def _check_feasible(total: int, numel: int, low: Sequence[int], high: Sequence[int]) -> None:
    """`total` must lie between the sums of the bounds."""
    if total < sum(low):
        # Rounded down: the printed number must itself be feasible.
        largest = math.floor((1 - Fraction(sum(low), numel)) * 10**6) / 10**6
        raise ValueError(
            f"sparsity: {total} active weights of {numel} are fewer than the {sum(low)} that "
            f"{len(low)} layers must keep; largest feasible sparsity: {largest}"
        )
    if total > sum(high):
        smallest = math.ceil((1 - Fraction(sum(high), numel)) * 10**6) / 10**6 if numel else 0.0
        raise ValueError(
            f"sparsity: {total} active weights of {numel} are more than the {sum(high)} that the "
            f"layers may keep; smallest feasible sparsity: {smallest}"
        )
