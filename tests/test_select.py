"""Pruning, dropping and regrowing, top-k: the rules, by hand, on every backend."""

import os
import re

import numpy as np
import pytest
import torch

from granet_kernels import (
    drop_regrow_,
    pack_mask,
    prune_,
    pruned_masks,
    topk_mask,
    unpack_mask,
    use_backend,
)
from granet_kernels.layout import full_mask
from granet_kernels.selftest import backends_with
from tests.helpers import HERE, INF, NAN, bits, mask_of

BACKENDS = backends_with("prune_")
OTHER_THAN_REFERENCE = [name for name in BACKENDS if name != "reference"]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with use_backend(request.param):
        yield request.param


def active(mask, numel):
    return unpack_mask(mask, (numel,)).int().tolist()


def test_prune_by_hand():
    weight = torch.tensor([0.5, -3.0, 0.0, 2.0, -1.0])
    momentum = torch.ones(5)
    mask = full_mask(5)
    prune_([weight], [mask], 2, momenta=[momentum])
    assert active(mask, 5) == [0, 1, 0, 1, 0]
    assert bits(weight) == bits([0, -3.0, 0, 2.0, 0])
    assert bits(momentum) == bits([0, 1.0, 0, 1, 0])


def test_prune_over_all_tensors():
    weights = [torch.tensor([1.0, 5.0]), torch.tensor([4.0, -2.0, 3.0])]
    masks = [full_mask(2), full_mask(3)]
    prune_(weights, masks, 3)
    assert [active(masks[0], 2), active(masks[1], 3)] == [[0, 1], [1, 0, 1]]


def test_prune_each_tensor():
    weights = [torch.tensor([1.0, 5.0]), torch.tensor([4.0, -2.0, 3.0])]
    masks = [full_mask(2), full_mask(3)]
    prune_(weights, masks, [1, 1])
    assert [active(masks[0], 2), active(masks[1], 3)] == [[0, 1], [1, 0, 0]]


def test_ties_go_to_the_lower_tensor_and_element():
    weights = [torch.tensor([1.0, -1.0]), torch.tensor([1.0, 1.0])]
    masks = [full_mask(2), full_mask(2)]
    prune_(weights, masks, 3)
    assert [active(masks[0], 2), active(masks[1], 2)] == [[1, 1], [1, 0]]


def test_element_order_is_that_of_memory():
    weight = torch.ones(1, 2, 2, 1).to(memory_format=torch.channels_last)
    mask = full_mask(4)
    prune_([weight], [mask], 2)
    assert weight.flatten().tolist() == [1, 0, 1, 0]  # both channels of the first pixel


def test_nan_ranks_as_the_largest_magnitude():
    weight = torch.tensor([INF, 1.0, NAN, -INF, -NAN])
    mask = full_mask(5)
    prune_([weight], [mask], 3)
    assert active(mask, 5) == [1, 0, 1, 0, 1]


def test_prune_never_activates():
    weight = torch.tensor([9.0, 1.0, 8.0, 2.0])
    mask = pack_mask(mask_of(0, 1, 0, 1))
    prune_([weight], [mask], 3)
    assert active(mask, 4) == [0, 1, 0, 1]


def test_what_stays_inactive_is_not_touched():
    """It is +0.0 already; only what changes sides is written."""
    weight, momentum = torch.tensor([9.0, 1.0, 8.0, 2.0]), torch.full((4,), 5.0)
    mask = pack_mask(mask_of(0, 1, 0, 1))
    prune_([weight], [mask], 1, momenta=[momentum])
    assert bits(weight) == bits([9.0, 0, 8.0, 2.0])
    assert bits(momentum) == bits([5.0, 0, 5.0, 5.0])
    drop_regrow_([weight], [mask], [torch.tensor([3.0, 0, 0, 0])], 1.0, momenta=[momentum])
    assert active(mask, 4) == [1, 0, 0, 0]
    assert bits(weight) == bits([0, 0, 8.0, 0])
    assert bits(momentum) == bits([0, 0, 5.0, 0])


@pytest.mark.parametrize("k", [0, 5])
def test_prune_to_nothing_and_to_everything(k):
    weight = torch.randn(5)
    mask = full_mask(5)
    prune_([weight], [mask], k)
    assert sum(active(mask, 5)) == k
    assert int((weight != 0).sum()) == k


@pytest.mark.parametrize("k", [0, 3, [1, 2], [2, 4], torch.tensor([5])], ids=str)
def test_pruned_masks_are_those_that_pruning_leaves(k):
    weights = [torch.tensor([1.0, -5.0]), torch.tensor([4.0, -2.0, NAN, 9.0])]
    masks = [full_mask(2), pack_mask(mask_of(1, 1, 1, 0))]
    before = [tensor.clone() for tensor in (*weights, *masks)]
    found = pruned_masks(weights, masks, k)
    for tensor, old in zip((*weights, *masks), before, strict=True):
        assert bits(tensor) == bits(old)
    prune_(weights, masks, k)
    assert all(torch.equal(*pair) for pair in zip(found, masks, strict=True))
    assert not {mask.data_ptr() for mask in found} & {mask.data_ptr() for mask in masks}


def test_k_on_the_device_is_not_read_by_the_host():
    weight, mask = torch.tensor([3.0, 1.0, 2.0]), full_mask(3)
    prune_([weight], [mask], torch.tensor([2]))
    assert active(mask, 3) == [1, 0, 1]


def test_drop_regrow_by_hand():
    weight = torch.tensor([4.0, 0.1, 3.0, -0.2, 0.0, 0.0])
    momentum = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 0.0])
    mask = pack_mask(mask_of(1, 1, 1, 1, 0, 0))
    scores = torch.tensor([9.0, -5.0, 9.0, 0.5, -7.0, 0.6])
    drop_regrow_([weight], [mask], [scores], 0.5, momenta=[momentum])  # drops 0.1 and -0.2
    assert active(mask, 6) == [
        1,
        1,
        1,
        0,
        1,
        0,
    ]  # regrows |-7|, and |-5|: one that was just dropped
    assert bits(weight) == bits([4.0, 0.1, 3.0, 0, 0, 0])
    assert bits(momentum) == bits([1.0, 2.0, 3.0, 0, 0, 0])


def test_what_regrows_starts_from_zero():
    """Even where the invariant was broken: an inactive weight that is not zero."""
    weight = torch.tensor([4.0, 0.1, 77.0])
    mask = pack_mask(mask_of(1, 1, 0))
    drop_regrow_([weight], [mask], [torch.tensor([0.0, 1.0, 2.0])], 0.5)
    assert active(mask, 3) == [1, 0, 1]
    assert bits(weight) == bits([4.0, 0, 0])


def test_a_regrown_momentum_starts_from_zero_too():
    weight, momentum = torch.tensor([4.0, 0.1, 0.0]), torch.tensor([1.0, 2.0, 77.0])
    mask = pack_mask(mask_of(1, 1, 0))
    drop_regrow_([weight], [mask], [torch.tensor([0, 1.0, 2.0])], 0.5, momenta=[momentum])
    assert bits(momentum) == bits([1.0, 0, 0])


@pytest.mark.parametrize(
    ("fraction", "active_count", "dropped"),
    [
        (0.3, 10, 3),
        (0.1, 10, 1),
        (0.005, 7, 1),
        (0.0, 7, 0),
        (1.0, 7, 7),
        (0.29, 100, 29),
        (0.5, 7, 4),
    ],
)
def test_drop_count_is_the_ceiling_of_one_double_product(fraction, active_count, dropped):
    """As the published code counts: 0.3 * 10 is 3.0 in doubles, though 0.3 is not three tenths."""
    numel = 3 * active_count
    weight = torch.arange(1.0, numel + 1)
    mask = pack_mask(torch.arange(numel) < active_count)
    scores = torch.where(torch.arange(numel) < active_count, 0.0, 1.0)
    drop_regrow_([weight], [mask], [scores], fraction)
    new = unpack_mask(mask, (numel,))
    assert int(new[active_count:].sum()) == dropped
    assert int(new.sum()) == active_count
    assert not new[:dropped].any()  # the smallest went
    assert new[active_count : active_count + dropped].all()  # equal scores: the lower index grows


def test_nan_scores_rank_last_but_fill_the_count():
    weight = torch.tensor([1.0, 2.0, 0.0, 0.0])
    mask = pack_mask(mask_of(1, 1, 0, 0))
    drop_regrow_([weight], [mask], [torch.tensor([NAN, 1.0, NAN, 0.0])], 0.5)
    assert active(mask, 4) == [0, 1, 0, 1]
    drop_regrow_([weight], [mask], [torch.full((4,), NAN)], 1.0)
    assert sum(active(mask, 4)) == 2


def test_scores_of_any_layout():
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    scores = torch.randn(4, 3, 3, 3)
    mask = pack_mask(torch.rand(4, 3, 3, 3) < 0.5, like=weight)
    plain_weight = weight.contiguous()
    plain_mask = pack_mask(unpack_mask(mask, weight.shape, like=weight))
    drop_regrow_([weight], [mask], [scores], 0.3)
    drop_regrow_([plain_weight], [plain_mask], [scores], 0.3)
    assert torch.equal(
        unpack_mask(mask, weight.shape, like=weight), unpack_mask(plain_mask, weight.shape)
    )
    assert torch.equal(weight, plain_weight)


def test_topk_mask_is_signed_and_straight_through():
    scores = torch.tensor([[1.0, -9.0], [NAN, 3.0]], requires_grad=True)
    (mask,) = topk_mask([scores], 2)
    assert mask.tolist() == [[1, 0], [0, 1]]
    mask.backward(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert scores.grad.tolist() == [[1, 2], [3, 4]]


def test_topk_mask_over_all_and_each():
    scores = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
    assert [m.tolist() for m in topk_mask(scores, 2)] == [[0, 0], [1, 1]]
    assert [m.tolist() for m in topk_mask(scores, [1, 1])] == [[0, 1], [0, 1]]
    assert topk_mask([], 0) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, m: prune_([w], [m], 10), "k: expected a count from 0 to 9, got 10"),
        (lambda w, m: prune_([w], [m], -1), "k: expected a count from 0 to 9, got -1"),
        (
            lambda w, m: prune_([w], [m], [1, 2]),
            "k: expected one count, or 1, one for each tensor, got 2",
        ),
        (lambda w, m: prune_([w], [m], torch.tensor([1.0])), "k: expected int64"),
        (lambda w, m: prune_(w, [m], 1), "weights: expected a sequence of tensors"),
        (
            lambda w, m: prune_([w], [m], 1, momenta=[torch.ones(8)]),
            "momenta[0]: expected the shape of weights[0], (9,), got (8,)",
        ),
        (lambda w, m: prune_([w, w], [m, m.clone()], 1), "weights[1]: expected memory of its own"),
        (lambda w, m: prune_([w, w.clone()], [m, m], 1), "masks[1]: expected memory of its own"),
        (
            lambda w, m: drop_regrow_([w], [m], [w], 1.5),
            "drop_fraction: expected a number in [0, 1], got 1.5",
        ),
        (
            lambda w, m: drop_regrow_([w], [m], [w], NAN),
            "drop_fraction: expected a number in [0, 1], got nan",
        ),
        (
            lambda w, m: drop_regrow_([w], [m], [], 0.5),
            "scores: expected 1 tensors, one for each of weights, got 0",
        ),
        (
            lambda w, m: drop_regrow_([w], [m], [w[:8]], 0.5),
            "scores[0]: expected the shape of weights[0]",
        ),
    ],
)
def test_errors_change_nothing(call, message):
    weight, mask = torch.arange(1.0, 10.0), full_mask(9)
    with pytest.raises((ValueError, TypeError)) as error:
        call(weight, mask)
    assert message in str(error.value)
    assert weight.tolist() == list(range(1, 10))
    assert torch.equal(mask, full_mask(9))


def test_momentum_of_another_layout_is_refused():
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    with pytest.raises(
        ValueError, match=r"momenta\[0\]: expected the memory layout of weights\[0\]"
    ):
        prune_([weight], [full_mask(108)], 5, momenta=[torch.zeros(4, 3, 3, 3)])


@pytest.mark.parametrize(("fraction", "dropped"), [(2.0, 15), (-1.0, 0), (NAN, 0), (INF, 15)])
def test_a_drop_fraction_on_the_device_is_clamped(fraction, dropped):
    """The host cannot check it, and the number of active weights must stay."""
    weight, mask = torch.arange(1.0, 31), pack_mask(torch.arange(30) < 15)
    scores = torch.arange(30.0)
    p = torch.tensor(fraction, dtype=torch.float64)
    drop_regrow_([weight], [mask], [scores], p)
    new = unpack_mask(mask, (30,))
    assert int(new.sum()) == 15
    assert int(new[15:].sum()) == dropped


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda w, m, s: drop_regrow_([w], [m], [s], 0.3, momenta=[s]),
            "momenta[0]: expected memory of its own",
        ),
        (
            lambda w, m, s: prune_([w], [m], torch.tensor([1], device="meta")),
            f"k: expected a tensor on {HERE}",
        ),
        (
            lambda w, m, s: prune_([w], [m], 2.0),
            "k: expected an integer, a list of them or an int64 tensor",
        ),
    ],
)
def test_more_errors(call, message):
    weight, mask, scores = torch.arange(1.0, 10.0), full_mask(9), torch.ones(9)
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        call(weight, mask, scores)
    assert weight.tolist() == list(range(1, 10))


def test_numpy_counts():
    weight, mask = torch.arange(1.0, 10.0), full_mask(9)
    prune_([weight], [mask], np.int64(4))
    assert sum(active(mask, 9)) == 4


def test_operators_refuse_empty_lists():
    """The public functions return at once; the operator would not know a device."""
    with pytest.raises(ValueError, match="masks: expected at least one tensor, got an empty list"):
        torch.ops.granet.count_active([])


def test_empty_lists():
    prune_([], [], 0)
    drop_regrow_([], [], [], 0.5)


# Triton's interpreter takes some ten milliseconds for a block of 4096 elements; other lists than this one
# are in triton_select.py.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OTHERS = [(), (torch.bfloat16,), (torch.float64, torch.float16)] if not INTERPRETED else [()]
# Above 16 384 the C++ backend guesses from a sample, and both backends go on in chunks.
MANY = 3 * 32_768 + 5 if not INTERPRETED else 20_485
SHAPES_OF_VALUES = {
    "normal": lambda g: torch.randn(MANY, generator=g),
    "equal": lambda g: torch.full((MANY,), -0.5),
    "mostly-zeros": lambda g: (
        torch.randn(MANY, generator=g) * (torch.rand(MANY, generator=g) < 0.1)
    ),
    "shared-exponent": lambda g: 1 + torch.rand(MANY, generator=g),
    "subnormal": lambda g: torch.randn(MANY, generator=g) * 1e-41,
    "sorted": lambda g: torch.arange(MANY) * 1e-3,
    "two-steps": lambda g: (
        1.0 + (torch.arange(MANY) < MANY // 5) + torch.rand(MANY, generator=g) * 1e-6
    ),
    "nan": lambda g: torch.where(
        torch.rand(MANY, generator=g) < 0.3, NAN, torch.randn(MANY, generator=g)
    ),
    # What decides lies between the places that a sample looks at.
    "hidden": lambda g: (
        torch.where(torch.arange(MANY) % 4096 < 3000, 1.0, 1e-4) * torch.rand(MANY, generator=g)
    ),
}


def same_as_reference(backend, operator, *args):
    """Run on copies, by the backend and by the reference; what is written must be the same, bit for bit."""

    def run(name):
        copies = [
            [t.clone() for t in arg] if isinstance(arg, list) else arg.clone() for arg in args
        ]
        with use_backend(name):
            result = operator(*copies)
        return [
            t for arg in [*copies, result or []] for t in (arg if isinstance(arg, list) else [arg])
        ]

    for ours, wanted in zip(run(backend), run("reference"), strict=True):
        assert ours.dtype == wanted.dtype
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0, equal_nan=True)
        if ours.is_floating_point():
            assert torch.equal(ours.signbit(), wanted.signbit())


@pytest.mark.parametrize("backend", OTHER_THAN_REFERENCE, indirect=True)
@pytest.mark.parametrize("values", SHAPES_OF_VALUES)
@pytest.mark.parametrize("others", OTHERS, ids=str)
def test_many_elements(backend, values, others):
    """The counts are those at which a guess, or a tie, is most easily taken for what it is not."""
    g = torch.Generator(torch.get_default_device()).manual_seed(0)
    weights = [SHAPES_OF_VALUES[values](g)]
    weights += [weights[0].roll(11)[: MANY // 2].to(dtype) for dtype in others]
    masks = [pack_mask(torch.rand(w.numel(), generator=g) < 0.6) for w in weights]
    momenta = [torch.randn(w.numel(), generator=g) for w in weights]
    scores = [torch.randn(w.numel(), generator=g).round(decimals=1) for w in weights]
    total = sum(w.numel() for w in weights)
    ops = torch.ops.granet
    for k in (1, total // 5, int((weights[0] != 0).sum())):
        same_as_reference(backend, ops.topk_mask, weights, torch.tensor([k]))
        same_as_reference(backend, ops.prune_, weights, masks, torch.tensor([k // 2]), momenta)
    each = torch.tensor([w.numel() // 4 for w in weights])
    same_as_reference(backend, ops.prune_, weights, masks, each, momenta)
    for fraction in (0.3, 1.0):
        p = torch.tensor(fraction, dtype=torch.float64)
        same_as_reference(backend, ops.drop_regrow_, weights, masks, scores, p, momenta)
        same_as_reference(backend, ops.drop_regrow_, weights, masks, weights, p, [])


def test_results_do_not_depend_on_threads():
    g = torch.Generator(torch.get_default_device()).manual_seed(0)
    weights = [torch.randn(n, generator=g).round(decimals=2) for n in (3 * MANY, 7, MANY + 11)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            state = [w.clone() for w in weights]
            masks = [full_mask(w.numel()) for w in state]
            prune_(state, masks, MANY)
            drop_regrow_(state, masks, [w.flip(0) for w in weights], 0.3)
            results.append([*state, *masks])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


@pytest.mark.parametrize(
    "scores",
    [
        lambda g: torch.randn(2 * MANY, generator=g)[::2],
        lambda g: torch.randn(1, generator=g).expand(MANY),
        lambda g: torch.randn(MANY, generator=g, dtype=torch.float64),
    ],
    ids=["every other", "one for all", "of another dtype"],
)
def test_scores_of_any_strides_and_dtype(backend, scores):
    g = torch.Generator(torch.get_default_device()).manual_seed(0)
    weights, p = [torch.randn(MANY, generator=g)], torch.tensor(0.5, dtype=torch.float64)
    masks = [pack_mask(torch.rand(MANY, generator=g) < 0.2)]
    score = scores(g)
    results = []
    for name in (backend, "reference"):
        copies = [w.clone() for w in weights], [m.clone() for m in masks]
        with use_backend(name):
            torch.ops.granet.drop_regrow_(*copies, [score], p, [])
        results.append([*copies[0], *copies[1]])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
