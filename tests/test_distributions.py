"""ERK against the published numbers, and integer budgets that hit their sum."""

import math
import random

import pytest

from granet.distributions import (
    DISTRIBUTIONS,
    Explicit,
    ScaledErk,
    active_budget,
    active_fraction,
    apportion,
    er,
    erk,
    layer_budgets,
    solve_erk,
    uniform,
)


def resnet50_shapes() -> dict[str, tuple[int, ...]]:
    """Convolution and linear weights of ResNet-50 for 1000 classes, in order of definition."""
    shapes: dict[str, tuple[int, ...]] = {"conv1": (64, 3, 7, 7)}
    channels = 64
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        width = 32 * 2**stage
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            shapes[f"{name}.conv1"] = (width, channels, 1, 1)
            shapes[f"{name}.conv2"] = (width, width, 3, 3)
            shapes[f"{name}.conv3"] = (4 * width, width, 1, 1)
            if block == 0:
                shapes[f"{name}.downsample.0"] = (4 * width, channels, 1, 1)
            channels = 4 * width
    shapes["fc"] = (1000, 2048)
    return shapes


RESNET50 = resnet50_shapes()


def test_resnet50_has_the_published_size():
    assert len(RESNET50) == 54
    assert sum(map(math.prod, RESNET50.values())) == 25_502_912


@pytest.mark.parametrize(
    ("sparsity", "epsilon", "dense", "conv1", "layer4", "fc"),
    [
        (0.5, 303.952, 32, 1.0, 0.1327, 0.4524),
        (0.8, 99.561, 8, 0.857, 0.0435, 0.1482),
        (0.9, 48.786, 1, 0.420, 0.0213, 0.0726),
        (0.95, 24.372, 0, 0.210, 0.0106, 0.0363),
    ],
)
def test_erk_of_resnet50(sparsity, epsilon, dense, conv1, layer4, fc):
    solution = solve_erk(list(RESNET50.values()), sparsity)
    fraction = dict(zip(RESNET50, solution.fractions, strict=True))
    assert round(solution.epsilon, 3) == epsilon
    assert len(solution.dense) == dense == list(solution.fractions).count(1.0)
    assert round(fraction["conv1"], 3) == conv1
    assert round(fraction["layer4.2.conv2"], 4) == layer4
    assert round(fraction["fc"], 4) == fc
    assert erk(list(RESNET50.values()), sparsity) == list(solution.fractions)


def test_erk_by_hand():
    # raw = 1/2 + 1/2 = 1 and 10/21, numels 4 and 21; at sparsity 0.6, 10 of 25 active:
    # epsilon = 10 / (4 + 10) = 5/7.
    solution = solve_erk([(2, 2), (3, 7)], 0.6)
    assert solution.epsilon == pytest.approx(5 / 7)
    assert solution.fractions == pytest.approx((5 / 7, 50 / 147))
    # At sparsity 0.2, 20 active: epsilon 10/7 > 1, so layer 0 is dense and 16 are left for layer 1.
    solution = solve_erk([(2, 2), (3, 7)], 0.2)
    assert solution.dense == (0,)
    assert solution.fractions == pytest.approx((1.0, 16 / 21))
    assert solution.epsilon == pytest.approx(16 / 10)


def test_erk_moves_ties_to_dense_together():
    # Layers 0 and 2 tie for the largest share. Solved again without both, layer 1 takes the rest.
    solution = solve_erk([(2, 2), (10, 10), (2, 2)], 0.5)
    assert solution.dense == (0, 2)
    assert solution.fractions == pytest.approx((1.0, 46 / 100, 1.0))


@pytest.mark.parametrize("rule", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
@pytest.mark.parametrize("sparsity", [0.0, 1e-17, 1e-9, 0.1, 0.5, 0.9, 0.999])
def test_fractions_keep_the_overall_sparsity(rule, sparsity):
    shapes = list(RESNET50.values())
    fractions = rule(shapes, sparsity)
    assert all(0 < fraction <= 1 for fraction in fractions)
    numels = [math.prod(shape) for shape in shapes]
    active = math.fsum(f * n for f, n in zip(fractions, numels, strict=True))
    assert active == pytest.approx((1 - sparsity) * sum(numels), rel=1e-12)


@pytest.mark.parametrize("rule", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_fraction_edge_cases(rule):
    assert rule([], 0.9) == []
    assert rule([(3, 4), (1,), (5, 5)], 0.0) == [1.0, 1.0, 1.0]
    assert rule([(1, 11)], 0.0) == [1.0]  # 11 / 12 * (12 / 11) < 1 in floats
    assert rule([(1,)], 0.5) == pytest.approx([0.5])
    for bad in (1.0, -0.1, math.nan):
        with pytest.raises(
            ValueError, match=rf"^sparsity: expected a number in \[0, 1\), got {bad}"
        ):
            rule([(3, 4)], bad)
    for shape in ((), (3, 0), (-1, 2)):
        with pytest.raises(ValueError, match=r"^shapes\[1\]: expected positive dimensions, got "):
            rule([(3, 4), shape], 0.5)


def test_uniform_is_the_decimal_complement():
    assert uniform([(3, 4), (7,)], 0.9) == [0.1, 0.1]  # 1 - 0.9 is 0.09999999999999998
    assert active_fraction(0.8) == 0.2


@pytest.mark.parametrize(
    ("sparsity", "numel", "active"),
    [
        (0.0, 7, 7),
        (0.9, 10, 1),
        (0.9, 25_502_912, 2_550_291),
        (0.5, 5, 3),  # 2.5 inactive rounds to the even 2
        (0.5, 7, 3),  # 3.5 to the even 4
        (0.4, 1, 1),
        (0.9, 1, 0),
        (0.5, 0, 0),
    ],
)
def test_active_budget(sparsity, numel, active):
    assert active_budget(sparsity, numel) == active


@pytest.mark.parametrize(
    ("arguments", "budgets"),
    [
        # Remainders .5 .3 .2: the unit goes to the first layer.
        ({"fractions": [0.25, 0.43, 0.32], "numels": [10, 10, 10], "total": 10}, [3, 4, 3]),
        ({"fractions": [0.32, 0.43, 0.25], "numels": [10, 10, 10], "total": 10}, [3, 4, 3]),
        # Equal remainders: the lower index.
        ({"fractions": [0.5, 0.5, 0.5], "numels": [3, 3, 3], "total": 5}, [2, 2, 1]),
        # .1 of 15 and of 25 both leave .5, hence tie, although not in binary.
        ({"fractions": [0.1, 0.1], "numels": [15, 25], "total": 4}, [2, 2]),
        ({"fractions": [0.1, 0.29], "numels": [10, 100], "total": 30}, [1, 29]),
        # A dense layer stays dense when the total is rounded down or up.
        ({"fractions": [1.0, 0.25], "numels": [9, 6], "total": 10}, [9, 1]),
        ({"fractions": [1.0, 0.25], "numels": [9, 6], "total": 11}, [9, 2]),
        ({"fractions": [1.0, 0.17, 0.17], "numels": [40, 10, 10], "total": 43}, [40, 2, 1]),
        # The floor binds: two ideals of .1; the others share the rest, 8, as 4 : 1.
        ({"fractions": [0.01, 0.8, 0.2, 0.01], "numels": [10] * 4, "total": 10}, [1, 6, 2, 1]),
        # The cap binds: what layer 0 may not keep goes to the others, as 1 : 2.
        (
            {"fractions": [0.5, 0.1, 0.2], "numels": [10] * 3, "total": 8, "caps": [2, 9, 9]},
            [2, 2, 4],
        ),
        # A total far from the fractions' own sum scales them.
        ({"fractions": [0.1, 0.2], "numels": [10, 10], "total": 9}, [3, 6]),
        # A cap below the floor wins: an emptied layer stays empty.
        ({"fractions": [0.5, 0.5], "numels": [4, 4], "total": 3, "caps": [0, 4]}, [0, 3]),
        # Layers that asked for nothing take what nobody else can.
        (
            {"fractions": [1, 0, 0], "numels": [4, 10, 20], "total": 10, "floor": 0},
            [4, 2, 4],
        ),
        ({"fractions": [0.5], "numels": [1], "total": 1}, [1]),
        ({"fractions": [0.5], "numels": [1], "total": 0, "floor": 0}, [0]),
        ({"fractions": [], "numels": [], "total": 0}, []),
        ({"fractions": [1.0, 1.0], "numels": [1, 5], "total": 6}, [1, 5]),
    ],
)
def test_apportion_by_hand(arguments, budgets):
    assert apportion(**arguments) == budgets


def random_case(rng: random.Random) -> dict:
    layers = rng.randint(1, 12)
    numels = [
        rng.choice((1, 2, 3, rng.randint(1, 50), rng.randint(1, 100_000))) for _ in range(layers)
    ]
    fractions = [rng.choice((0.0, 1.0, 0.5, rng.random(), rng.random() ** 4)) for _ in numels]
    caps = [rng.randint(0, n) if rng.random() < 0.3 else n for n in numels]
    floor = rng.choice((0, 1, 1, 2))
    total = rng.randint(sum(min(floor, cap) for cap in caps), sum(caps))
    return {"fractions": fractions, "numels": numels, "total": total, "caps": caps, "floor": floor}


def test_apportion_random_cases_stay_within_bounds():
    rng = random.Random(0)
    for _ in range(3000):
        case = random_case(rng)
        budgets = apportion(**case)
        assert sum(budgets) == case["total"], case
        for budget, cap in zip(budgets, case["caps"], strict=True):
            assert min(case["floor"], cap) <= budget <= cap, case


def test_apportion_random_cases_are_proportional():
    # For some common scale, every budget is one of the two integers at its scaled, cut ideal.
    rng = random.Random(1)
    for _ in range(1000):
        case = random_case(rng)
        budgets = apportion(**case)
        smallest, largest = 0.0, math.inf
        for fraction, numel, cap, budget in zip(
            case["fractions"], case["numels"], case["caps"], budgets, strict=True
        ):
            low, wanted = min(case["floor"], cap), fraction * numel
            if wanted > 0 and budget > low:
                smallest = max(smallest, (budget - 1) / wanted)
            if wanted > 0 and budget < cap:
                largest = min(largest, (budget + 1) / wanted)
        assert smallest <= largest * (1 + 1e-12), case


def test_apportion_random_cases_round_the_unconstrained_ideal():
    rng = random.Random(2)
    for _ in range(1000):
        numels = [rng.randint(1, 10_000) for _ in range(rng.randint(1, 60))]
        fractions = [rng.choice((1.0, rng.uniform(1 / n, 1))) for n in numels]
        ideals = [f * n for f, n in zip(fractions, numels, strict=True)]
        total = round(math.fsum(ideals))
        budgets = apportion(fractions, numels, total)
        assert sum(budgets) == total
        for fraction, budget, ideal, numel in zip(fractions, budgets, ideals, numels, strict=True):
            assert abs(budget - ideal) < 1 + 1e-9
            assert budget == numel or fraction < 1


def test_apportion_gives_equal_layers_the_unit_in_order():
    rng = random.Random(3)
    for _ in range(200):
        layers = rng.randint(1, 30)
        numel = rng.randint(2, 1000)
        total = rng.randint(layers, layers * numel)
        base, extra = divmod(total, layers)
        budgets = apportion([total / (layers * numel)] * layers, [numel] * layers, total)
        assert budgets == [base + 1] * extra + [base] * (layers - extra)


def test_apportion_names_the_largest_feasible_sparsity():
    message = (
        r"^sparsity: 2 active weights of 300 are fewer than the 3 that 3 layers must keep; "
        r"largest feasible sparsity: 0\.99$"
    )
    with pytest.raises(ValueError, match=message):
        apportion([0.01] * 3, [100] * 3, 2)


def test_the_named_sparsity_is_rounded_down():
    shapes = [(1000, 10_000)] * 3  # 1 - 3 / 30 000 000 would print as 1.0
    with pytest.raises(ValueError, match=r"largest feasible sparsity: 0\.999999$"):
        layer_budgets(shapes, 0.99999999, "uniform")
    assert sum(layer_budgets(shapes, 0.999999, "uniform")) == 30


def test_the_named_sparsity_is_feasible():
    rng = random.Random(4)
    for _ in range(200):
        shapes = [(rng.randint(1, 40),) for _ in range(rng.randint(1, 9))]
        try:
            layer_budgets(shapes, 0.9999, "erk")
        except ValueError as error:
            largest = float(str(error).rsplit(" ", 1)[1])
            assert 0 <= largest < 0.9999
            assert min(layer_budgets(shapes, largest, "erk")) >= 1
        else:
            assert shapes == [(1,)]


def test_apportion_names_the_smallest_feasible_sparsity():
    message = (
        r"^sparsity: 50 active weights of 100 are more than the 40 that the layers may keep; "
        r"smallest feasible sparsity: 0\.6$"
    )
    with pytest.raises(ValueError, match=message):
        apportion([0.5] * 2, [50] * 2, 50, caps=[20, 20])
    with pytest.raises(ValueError, match=r"^sparsity: 1 active weights of 0 are more than the 0 "):
        apportion([], [], 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fractions": [0.5]}, "fractions: expected 2 of them, got 1"),
        ({"caps": [1]}, "caps: expected 2 of them, got 1"),
        ({"caps": [1, 11]}, r"caps\[1\]: expected an integer in \[0, 10\], got 11"),
        ({"fractions": [0.5, math.nan]}, r"fractions\[1\]: expected a number >= 0, got nan"),
        ({"fractions": [-0.5, 0.5]}, r"fractions\[0\]: expected a number >= 0, got -0.5"),
        ({"numels": [10, 0]}, r"numels\[1\]: expected an integer of at least 1, got 0"),
        ({"floor": -1}, "floor: expected an integer of at least 0, got -1"),
    ],
)
def test_apportion_names_bad_arguments(change, message):
    arguments = {"fractions": [0.5, 0.5], "numels": [10, 10], "total": 10} | change
    with pytest.raises(ValueError, match=r"^" + message):
        apportion(**arguments)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8, 0.9, 0.95, 0.98, 0.9999])
def test_layer_budgets_of_resnet50(distribution, sparsity):
    shapes = list(RESNET50.values())
    budgets = layer_budgets(shapes, sparsity, distribution)
    assert sum(budgets) == active_budget(sparsity, 25_502_912)
    for budget, fraction, shape in zip(
        budgets, DISTRIBUTIONS[distribution](shapes, sparsity), shapes, strict=True
    ):
        assert abs(budget - fraction * math.prod(shape)) < 1
        assert fraction < 1 or budget == math.prod(shape)


def test_layer_budgets_edge_cases():
    assert layer_budgets([], 0.9, "erk") == []
    assert layer_budgets([(1,)], 0.4, "erk") == [1]
    assert layer_budgets([(2, 2), (3,)], 0.0, "uniform") == [4, 3]
    assert layer_budgets([(4, 5), (4, 5)], 0.5, "uniform", caps=[4, 20]) == [4, 16]
    with pytest.raises(
        ValueError, match=r"^sparsity: 0 active .* largest feasible sparsity: 0\.0$"
    ):
        layer_budgets([(1,)], 0.9, "erk")
    with pytest.raises(
        ValueError, match=r"^distribution: expected one of erk, er, uniform.*got 'erdos'$"
    ):
        layer_budgets([(2, 2)], 0.5, "erdos")


# --- other rules ----------------------------------------------------------------------------------


def test_er_leaves_the_kernel_out():
    shapes = [(8, 4, 3, 3), (16, 8)]
    first, second = er(shapes, 0.9)
    assert first / second == pytest.approx((12 / 32) / (24 / 128))
    assert 288 * first + 128 * second == pytest.approx(41.6)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_a_power_of_the_quotient(power):
    shapes = [(64, 32, 3, 3), (128, 64)]
    first, second = ScaledErk(power)(shapes, 0.95)
    quotient = ((64 + 32 + 6) / (64 * 32 * 9)) / (192 / (128 * 64))
    assert first / second == pytest.approx(quotient**power)
    total = 64 * 32 * 9 * first + 128 * 64 * second
    assert total == pytest.approx(0.05 * (64 * 32 * 9 + 128 * 64))


def test_explicit_sparsities():
    shapes = [(10, 10), (10, 20)]
    assert layer_budgets(shapes, 0.8, Explicit((0.5, 0.95))) == [50, 10]
    # On the way there the proportions are kept as far as sizes allow.
    assert sum(layer_budgets(shapes, 0.5, Explicit((0.5, 0.95)))) == 150
    with pytest.raises(ValueError, match="distribution: expected a sparsity for each of 2 layers"):
        Explicit((0.5,))(shapes, 0.5)
    with pytest.raises(ValueError, match="power: expected a number of at least 0, got -1"):
        ScaledErk(-1)(shapes, 0.5)
