"""A whole update at once: bit for bit what pruning, then dropping and regrowing makes of the same tensors."""

import itertools
import os
import re

import pytest
import torch

from granet_kernels import (
    count_active,
    drop_regrow_,
    pack_mask,
    prune_,
    prune_drop_regrow_,
    unpack_mask,
    use_backend,
)
from granet_kernels.layout import full_mask
from granet_kernels.selftest import backends_with, compare
from granet_kernels.selftest.inputs import VALUES
from tests.helpers import HERE, INF, NAN, bits, mask_of
from tests.test_select import MANY, SHAPES_OF_VALUES

BACKENDS = backends_with("prune_drop_regrow_")
# Triton's interpreter takes a second for a list of tensors, and computes this by its two operators.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SIZES = (0, 1, 7, 8, 9, 31, 33, 63, 64, 65, 127, 1009)
FRACTIONS = (0.0, 1e-9, 0.3, 0.5, 1.0)
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with use_backend(request.param):
        yield request.param


def in_turn(weights, masks, scores, k, fraction, momenta):
    """What the operator is to be."""
    torch.ops.granet.prune_(weights, masks, k, momenta)
    pruned = [mask.clone() for mask in masks]
    torch.ops.granet.drop_regrow_(weights, masks, scores, fraction, momenta)
    return pruned


def generator(seed=0):
    return torch.Generator(HERE).manual_seed(seed)


def of_fraction(p):
    return torch.tensor(p, dtype=torch.float64)


def assert_as_in_turn(weights, masks, scores, k, p, momenta=()):
    """The same weights, masks, momenta and returned masks: as in turn on this backend and the reference.

    Args:
        k: a count or a list of them, which may be out of range, as a tensor's may.
        p: likewise.
    """
    counts, fraction = torch.tensor(k if isinstance(k, list) else [k]), of_fraction(p)

    def run(operator):
        copies = [[tensor.clone() for tensor in part] for part in (weights, masks, momenta)]
        pruned = operator(*copies[:2], scores, counts, fraction, copies[2])
        return [tensor for part in (*copies, pruned) for tensor in part]

    ours = run(torch.ops.granet.prune_drop_regrow_)
    expected = [run(in_turn)]
    with use_backend("reference"):
        expected.append(run(torch.ops.granet.prune_drop_regrow_))
    for wanted in expected:
        for i, (result, want) in enumerate(zip(ours, wanted, strict=True)):
            assert compare(result, want, want, 0) is None, f"tensor {i} of all that is written"


def draw(values, sizes, seed=0, dtypes=(FP32,)):
    """Tensors of such values, a dtype for each in turn."""
    g = generator(seed)
    return [
        VALUES[values](n, g).to(dtype)
        for n, dtype in zip(sizes, itertools.cycle(dtypes), strict=False)
    ]


def random_masks(sizes, seed=0, density=0.6):
    g = generator(seed)
    return [pack_mask(torch.rand(n, generator=g) < density) for n in sizes]


# --- by hand --------------------------------------------------------------------------------------


def test_by_hand():
    weight = torch.tensor([4.0, 0.1, 3.0, -0.2, 0.5, 0.0])
    momentum = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 0.0])
    mask = pack_mask(mask_of(1, 1, 1, 1, 1, 0))
    scores = torch.tensor([9.0, 8.0, 9.0, 0.5, 5.0, -7.0])
    version = weight._version
    # Prunes 0.1; of the four that are left drops -0.2 and 0.5; regrows |8|, just pruned, and |-7|.
    (pruned,) = prune_drop_regrow_([weight], [mask], [scores], 4, 0.5, momenta=[momentum])
    assert unpack_mask(pruned, (6,)).int().tolist() == [1, 0, 1, 1, 1, 0]
    assert unpack_mask(mask, (6,)).int().tolist() == [1, 1, 1, 0, 0, 1]
    assert bits(weight) == bits([4.0, 0.0, 3.0, 0, 0, 0])
    assert bits(momentum) == bits([1.0, 0.0, 3.0, 0, 0, 0])
    assert weight._version > version


def test_dropped_and_regrown_keeps_value_and_momentum():
    """But what was pruned and regrew starts from zero."""
    weight, momentum = torch.tensor([4.0, 0.1, 3.0]), torch.tensor([1.0, 2.0, 3.0])
    mask, scores = full_mask(3), torch.tensor([0.0, 2.0, 1.0])
    prune_drop_regrow_([weight], [mask], [scores], 2, 1.0, momenta=[momentum])
    assert unpack_mask(mask, (3,)).int().tolist() == [0, 1, 1]
    assert bits(weight) == bits([0, 0, 3.0])
    assert bits(momentum) == bits([0, 0, 3.0])


def test_what_stays_inactive_is_not_touched():
    weight, momentum = torch.tensor([9.0, 1.0, 8.0, 2.0]), torch.full((4,), 5.0)
    mask = pack_mask(mask_of(0, 1, 0, 1))
    scores = torch.tensor([3.0, 0, 0, 0])
    prune_drop_regrow_([weight], [mask], [scores], 1, 1.0, momenta=[momentum])
    assert unpack_mask(mask, (4,)).int().tolist() == [1, 0, 0, 0]
    assert bits(weight) == bits([0, 0, 8.0, 0])
    assert bits(momentum) == bits([0, 0, 5.0, 0])


def test_the_public_function_is_the_two_in_turn():
    g = generator()
    sizes = (65, 1009, 8)
    weights, scores = ([torch.randn(n, generator=g) for n in sizes] for _ in "ab")
    for k in (400, [20, 300, 8], torch.tensor([400])):
        results = []
        for at_once in (True, False):
            w, m = [weight.clone() for weight in weights], [full_mask(n) for n in sizes]
            if at_once:
                pruned = prune_drop_regrow_(w, m, scores, k, 0.3)
            else:
                prune_(w, m, k)
                pruned = [mask.clone() for mask in m]
                drop_regrow_(w, m, scores, 0.3)
            results.append([*w, *m, *pruned])
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_returned_masks_are_new():
    """Whoever holds them may write to them, and they are padded with zeros."""
    sizes = (1, 33, 129)
    weights, masks = [torch.ones(n) for n in sizes], [full_mask(n) for n in sizes]
    pruned = prune_drop_regrow_(weights, masks, [w.clone() for w in weights], 163, 0.0)
    assert len({mask.data_ptr() for mask in [*masks, *pruned]}) == 6
    assert all(torch.equal(*pair) for pair in zip(pruned, masks, strict=True))
    for mask in pruned:
        mask.zero_()
    assert count_active(masks).tolist() == list(sizes)


# --- as in turn -----------------------------------------------------------------------------------


def counts(which, masks, sizes):
    """By what is active: nothing, some, all of it, or more."""
    active = count_active(masks).tolist()
    return {
        "nothing": [0 for _ in active],
        "some": [(2 * n + 2) // 3 for n in active],
        "all": active,
        "more": sizes,
    }[which]


KEPT = ("nothing", "some", "all", "more")
KEPT_AND_FRACTIONS = [*itertools.product(KEPT, FRACTIONS)][:: 6 if INTERPRETED else 1]


@pytest.mark.parametrize("each", [False, True], ids=["together", "each"])
@pytest.mark.parametrize(("kept", "p"), KEPT_AND_FRACTIONS, ids=str)
def test_counts_and_fractions(kept, p, each):
    """On awkward sizes; what is inactive is not zero."""
    masks = random_masks(SIZES)
    weights, scores, momenta = (draw("normal", SIZES, seed) for seed in range(3))
    k = counts(kept, masks, list(SIZES))
    assert_as_in_turn(weights, masks, scores, k if each else sum(k), p, momenta)


@pytest.mark.parametrize("kinds", [*itertools.product(VALUES, VALUES)][:: 13 if INTERPRETED else 1])
def test_values_of_weights_and_scores(kinds):
    masks = random_masks(SIZES)
    weights, scores = (draw(kind, SIZES, seed) for seed, kind in enumerate(kinds))
    momenta = draw("special", SIZES, 2)
    for k, p in ((500, 0.5), ([n // 3 for n in SIZES], 0.3)):
        assert_as_in_turn(weights, masks, scores, k, p, momenta)


@pytest.mark.parametrize(
    ("dtypes", "of_momenta", "of_scores"),
    [
        ((BF16,), None, (BF16,)),
        ((BF16,), (FP32,), (FP32,)),
        ((FP16,), (FP16,), (FP16,)),
        ((FP64,), (FP64,), (FP32,)),
        ((FP32,), (BF16,), (FP64,)),
        ((FP32, BF16, FP64, FP16), (FP16, FP32, FP32, BF16), (BF16, FP64, FP16)),
    ],
    ids=str,
)
def test_dtypes(dtypes, of_momenta, of_scores):
    """Weights, momenta and scores each have theirs, and lists mix them."""
    masks = random_masks(SIZES)
    for values in ("normal", "special") if not INTERPRETED else ("special",):
        weights = draw(values, SIZES, 0, dtypes)
        scores = draw(values, SIZES, 1, of_scores)
        momenta = [] if of_momenta is None else draw("normal", SIZES, 2, of_momenta)
        for k in (450, [n // 2 for n in SIZES])[: 1 if INTERPRETED else 2]:
            assert_as_in_turn(weights, masks, scores, k, 0.3, momenta)


def test_layouts():
    """Scores have any strides; weights and momenta are channels_last, transposed, and part of a buffer."""
    g = generator()
    images = torch.randn(3, 6, 5, 3, 3, generator=g)
    weight, momentum = (t.contiguous(memory_format=torch.channels_last) for t in images[:2])
    turned = torch.randn(2, 40, 25, generator=g).transpose(1, 2)
    buffer = torch.randn(2, 80, generator=g)
    weights, momenta = (
        [weight, turned[0], buffer[0, 1:78]],
        [momentum, turned[1], buffer[1, 1:78]],
    )
    scores = [
        images[2],
        torch.randn(25, 40, generator=g),
        torch.tensor(0.5).expand(77),
    ]
    masks = random_masks([w.numel() for w in weights])
    for k in (500, [100, 300, 40]):
        assert_as_in_turn(weights, masks, scores, k, 0.3, momenta)


@pytest.mark.parametrize("momenta", [False, True])
def test_layers_of_different_scale(momenta):
    """Pruned together one is emptied, and one stays whole."""
    sizes = (700, 1000, 333, 64)
    scaled = [t * s for t, s in zip(draw("normal", sizes), (1, 1e-3, 1e3, 1), strict=True)]
    scores = draw("normal", sizes, 1)
    states = draw("normal", sizes, 2) if momenta else []
    cases = [*itertools.product((1.1, 0.6), (300, 600, 900), (0.3, 1.0))]
    for density, k, p in cases[:: 5 if INTERPRETED else 1]:
        assert_as_in_turn(scaled, random_masks(sizes, density=density), scores, k, p, states)
    weights, masks = [w.clone() for w in scaled], [full_mask(n) for n in sizes]
    pruned = prune_drop_regrow_(weights, masks, scores, 600, 0.3)
    found = count_active(pruned).tolist()
    assert (found[1], found[2], sum(found)) == (0, 333, 600)
    assert count_active(masks).tolist() == found


@pytest.mark.parametrize("k", [-3, 0, 1 << 40])
@pytest.mark.parametrize("p", [-1.0, 2.0, NAN, INF])
def test_numbers_on_the_device_that_are_out_of_range(k, p):
    """The host cannot check them."""
    weights, masks = draw("normal", (33, 7)), random_masks((33, 7))
    assert_as_in_turn(weights, masks, draw("normal", (33, 7), 1), k, p)


# --- many elements --------------------------------------------------------------------------------

# The C++ backend guesses thresholds from a sample where there are more than some ten thousand.
SAMPLED = [name for name in BACKENDS if name == "cpp"]
LARGE = (40_000, 300_000, 65, 40_000)


@pytest.mark.parametrize("backend", SAMPLED, indirect=True)
@pytest.mark.parametrize("p", [1e-9, 0.02, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("each", [False, True], ids=["together", "each"])
def test_many_elements(backend, each, p):
    g = generator()
    weights, scores, momenta = ([torch.randn(n, generator=g) for n in LARGE] for _ in "abc")
    tied = [[t.round(decimals=2) for t in part] for part in (weights, scores)]
    skewed = [w * s for w, s in zip(weights, (1, 1e-3, 1e3, 1e-3), strict=True)]
    masks = random_masks(LARGE, density=0.3)
    active = count_active(masks).tolist()
    for share in (0.0, 0.1, 0.9, 0.999, 1.0):
        k = [int(share * n) for n in active]
        for values, of_scores in ((weights, scores), tied, (skewed, scores)):
            assert_as_in_turn(values, masks, of_scores, k if each else sum(k), p, momenta)


@pytest.mark.parametrize("backend", SAMPLED, indirect=True)
@pytest.mark.parametrize("values", SHAPES_OF_VALUES)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
def test_values_that_mislead_a_sample(backend, values, dtype):
    """In weights, in scores, and in both; counts at which a guess or a tie is most easily wrong."""
    g = generator()
    awkward = [SHAPES_OF_VALUES[values](g).to(dtype), SHAPES_OF_VALUES[values](g).to(dtype)]
    plain = [torch.randn(MANY, generator=g, dtype=torch.float64).to(dtype) for _ in "ab"]
    masks = random_masks((MANY, MANY))
    active = int(count_active(masks).sum())
    for weights, scores in ((awkward, plain), (plain, awkward), (awkward, awkward[::-1])):
        for k in (1, active // 3, active - 1, [MANY // 4, MANY // 2]):
            for p in (0.3, 1.0):
                assert_as_in_turn(weights, masks, scores, k, p, plain[::-1])


@pytest.mark.parametrize("backend", SAMPLED, indirect=True)
@pytest.mark.parametrize("density", [0.0, 1e-4, 0.02, 1.1])
def test_masks_from_empty_to_full(backend, density):
    g = generator()
    weights, scores = ([torch.randn(n, generator=g) for n in LARGE] for _ in "ab")
    masks = random_masks(LARGE, density=density)
    active = count_active(masks).tolist()
    for k in (sum(active) // 2, active, [n // 2 for n in active]):
        for p in FRACTIONS:
            assert_as_in_turn(weights, masks, scores, k, p)


def test_results_do_not_depend_on_threads():
    sizes = (40_000, 7, 70_001) if not INTERPRETED else (5000, 7)
    g = generator()
    weights, scores = ([torch.randn(n, generator=g).round(decimals=2) for n in sizes] for _ in "ab")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            state, masks = [w.clone() for w in weights], [full_mask(n) for n in sizes]
            pruned = prune_drop_regrow_(state, masks, scores, sum(sizes) // 4, 0.3)
            results.append([*state, *masks, *pruned])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, m, s, v: ([w], [m], [s], 10, 0.3), "k: expected a count from 0 to 9, got 10"),
        (lambda w, m, s, v: ([w], [m], [s], [1, 2], 0.3), "k: expected one count, or 1"),
        (lambda w, m, s, v: ([w], [m], [s], 2.0, 0.3), "k: expected an integer, a list of them"),
        (lambda w, m, s, v: ([w], [m], [s], torch.tensor([1.0]), 0.3), "k: expected int64 (1,)"),
        (lambda w, m, s, v: ([w], [m], [s], 4, 1.5), "drop_fraction: expected a number in [0, 1]"),
        (lambda w, m, s, v: ([w], [m], [s], 4, NAN), "drop_fraction: expected a number in [0, 1]"),
        (
            lambda w, m, s, v: ([w], [m], [s], 4, torch.tensor(0.3)),
            "drop_fraction: expected a float64 tensor of one element",
        ),
        (lambda w, m, s, v: (w, [m], [s], 4, 0.3), "weights: expected a sequence of tensors"),
        (lambda w, m, s, v: ([w], [m], s, 4, 0.3), "scores: expected a sequence of tensors"),
        (lambda w, m, s, v: ([w], [], [s], 4, 0.3), "masks: expected 1 tensors"),
        (lambda w, m, s, v: ([w], [m[:8]], [s], 4, 0.3), "masks[0]: expected uint8 (16,)"),
        (lambda w, m, s, v: ([w], [m], [], 4, 0.3), "scores: expected 1 tensors"),
        (lambda w, m, s, v: ([w], [m], [s[:8]], 4, 0.3), "scores[0]: expected the shape of"),
        (lambda w, m, s, v: ([w], [m], [s.int()], 4, 0.3), "scores[0]: expected a float32"),
        (lambda w, m, s, v: ([w], [m], [w], 4, 0.3), "weights[0]: expected memory of its own"),
        (lambda w, m, s, v: ([w], [m], [s], 4, 0.3, [s]), "momenta[0]: expected memory of its own"),
        (lambda w, m, s, v: ([w], [m], [s], 4, 0.3, [v[:8]]), "momenta[0]: expected the shape of"),
        (lambda w, m, s, v: ([w], [m], [s], 4, 0.3, [v, v]), "momenta: expected 1 tensors"),
    ],
)
def test_errors_change_nothing(call, message):
    weight, mask, scores = torch.arange(1.0, 10), full_mask(9), torch.ones(9)
    momentum = torch.arange(9.0)
    args = call(weight, mask, scores, momentum)
    momenta = args[5] if len(args) > 5 else [momentum]
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        prune_drop_regrow_(*args[:5], momenta=momenta)
    assert weight.tolist() == list(range(1, 10))
    assert momentum.tolist() == list(range(9))
    assert torch.equal(mask, full_mask(9))


def test_momentum_of_another_layout_is_refused():
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    momentum = torch.zeros(4, 3, 3, 3)
    with pytest.raises(ValueError, match=r"momenta\[0\]: expected the memory layout of weights"):
        prune_drop_regrow_([weight], [full_mask(108)], [weight.clone()], 5, 0.3, momenta=[momentum])


def test_empty_lists():
    assert prune_drop_regrow_([], [], [], 0, 0.5) == []
    with pytest.raises(ValueError, match="weights: expected at least one tensor"):
        torch.ops.granet.prune_drop_regrow_([], [], [], torch.tensor([0]), of_fraction(0.5), [])
