"""Schedules, listed value by value, and the published runs' numbers."""

import math

import pytest

from granet.schedules import (
    CURVES,
    Constant,
    CosineDecay,
    Ramp,
    UpdateClock,
    as_drop_schedule,
    as_step,
)

# ResNet-50 on ImageNet: 100 epochs of 10009 steps, pruning from 0 to epoch 30, update every 4000.
IMAGENET = {"initial": 0.5, "final": 0.8, "begin": 0, "end": 30 * 10009, "every": 4000}
# CIFAR-10, batch 128: 160 epochs of 352 steps, pruning from 0 to epoch 80, update every 1000.
CIFAR = {"initial": 0.5, "final": 0.9, "begin": 0, "end": 80 * 352, "every": 1000}


def prunes(ramp: Ramp, total_steps: int) -> list[int]:
    return [step for step in range(0, total_steps, ramp.every) if ramp.prunes_at(step)]


@pytest.mark.parametrize(
    ("time", "total", "step"),
    [
        (0, 10, 0),
        (10, 10, 10),
        ("0%", 10, 0),
        ("50%", 7, 3),
        ("100%", 7, 7),
        ("29%", 100, 29),  # 0.29 * 100 is 28.999... in floats
        ("12.5%", 80, 10),
        (" 50 % ", 8, 4),
    ],
)
def test_as_step(time, total, step):
    assert as_step(time, total, "prune_until") == step


@pytest.mark.parametrize("time", [-1, 11, "-5%", "half", "0.5", "50", "%", "1e1%", "5%%"])
def test_as_step_refuses(time):
    with pytest.raises(ValueError, match=r"^prune_until: expected a step .*got " + f"{time!r}$"):
        as_step(time, 10, "prune_until")


def test_as_step_refuses_more_than_the_run():
    with pytest.raises(
        ValueError, match=r"^prune_until: expected a percentage of at most 100%, got '100\.1%'$"
    ):
        as_step("100.1%", 10, "prune_until")


@pytest.mark.parametrize("time", [0.5, True, None])
def test_as_step_refuses_types(time):
    with pytest.raises(TypeError, match=f"^prune_until: expected a step .* got {time!r}$"):
        as_step(time, 10, "prune_until")


def test_as_step_refuses_an_empty_run():
    with pytest.raises(
        ValueError, match=r"^total_steps: expected an integer of at least 1, got 0$"
    ):
        as_step(0, 0, "prune_until")


def test_constant():
    assert [Constant(value=0.3)(step) for step in (0, 1, 10**9)] == [0.3] * 3


def test_cosine_decay_listed():
    decay = CosineDecay(initial=0.8, total_steps=6, floor=0.2)
    expected = [0.8, 0.5 + 0.15 * 3**0.5, 0.65, 0.5, 0.35, 0.5 - 0.15 * 3**0.5, 0.2, 0.2]
    assert [decay(step) for step in range(8)] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("step", "value"), [(4_000, 0.49998), (300_000, 0.39815), (500_000, 0.25285)]
)
def test_cosine_decay_of_the_imagenet_run(step, value):
    assert round(CosineDecay(initial=0.5, total_steps=100 * 10009)(step), 5) == value


@pytest.mark.parametrize("initial", [0.005, 0.1, 0.3, 0.5, 0.7, 1.0])
def test_cosine_decay_hits_both_ends(initial):
    decay = CosineDecay(initial=initial, total_steps=1001)
    assert decay(0) == initial
    assert decay(1001) == decay(5000) == 0.005
    values = [decay(step) for step in range(1002)]
    assert values == sorted(values, reverse=True)


def test_rounding_never_carries_a_value_past_the_end():
    # 0.005 + (0.013 - 0.005) > 0.013 and 0.03 + (0.29 - 0.03) > 0.29 in floats.
    assert CosineDecay(initial=0.013, total_steps=10**9)(1) == 0.013
    # And 0.05 + (0.21 - 0.05) < 0.21.
    assert CosineDecay(initial=0.21, floor=0.05, total_steps=10)(0) == 0.21
    ramp = Ramp(initial=0.03, final=0.29, begin=0, end=10**6, every=1)
    assert ramp(10**6 - 1) == ramp(10**6) == 0.29


def test_exact_ramp_listed():
    ramp = Ramp(initial=0.1, final=0.9, begin=10, end=50, every=10)
    after = {0: 0.1, 10: 0.1, 20: 0.5625, 30: 0.8, 40: 0.8875, 50: 0.9, 60: 0.9}
    assert [ramp(step) for step in after] == pytest.approx(list(after.values()), abs=1e-15)
    assert [ramp(step + 9) for step in after] == [ramp(step) for step in after]
    assert prunes(ramp, 100) == [20, 30, 40, 50]
    assert not any(ramp.prunes_at(step) for step in range(100) if step % 10)


def test_official_ramp_listed():
    ramp = Ramp(initial=0.1, final=0.9, begin=10, end=50, every=10, official_rounding=True)
    after = {0: 0.1, 10: 0.1, 20: 0.5625, 30: 0.8, 40: 0.8875, 50: 0.8875, 60: 0.8875}
    assert [ramp(step) for step in after] == pytest.approx(list(after.values()), abs=1e-15)
    assert [ramp(step + 9) for step in after] == [ramp(step) for step in after]
    assert prunes(ramp, 100) == [10, 20, 30, 40]  # the first one to the initial sparsity
    assert not any(ramp.prunes_at(step) for step in range(100) if step % 10)


@pytest.mark.parametrize(
    ("begin", "end", "official", "expected"),
    [
        (0, 40, False, [10, 20, 30, 40]),
        (1, 49, False, [20, 30, 40]),  # begins at 10 (first update after 1), ends at 40
        (1, 49, True, [10, 20, 30]),  # begins at 0
        (11, 49, True, [10, 20, 30]),  # the published code rounds begin down
        (5, 10, False, [10]),  # one update index: a single prune, to the target
        (30, 30, False, [30]),
    ],
)
def test_ramp_ends_between_updates(begin, end, official, expected):
    ramp = Ramp(initial=0, final=0.5, begin=begin, end=end, every=10, official_rounding=official)
    assert prunes(ramp, 100) == expected
    assert ramp(expected[0] - 1) == 0
    assert official or ramp(expected[-1]) == 0.5


def test_imagenet_official_ramp():
    ramp = Ramp(**IMAGENET, official_rounding=True)
    steps = prunes(ramp, 100 * 10009)
    assert len(steps) == 74
    assert (steps[0], steps[-1]) == (4_000, 296_000)
    assert round(ramp(4_000), 7) == 0.5118407
    assert round(ramp(296_000), 7) == 0.7999993
    assert ramp(100 * 10009) == ramp(296_000)


def test_cifar_official_ramp():
    ramp = Ramp(**CIFAR, official_rounding=True)
    steps = prunes(ramp, 160 * 352)
    assert len(steps) == 27
    assert round(ramp(steps[0]), 7) == 0.5413448
    assert round(ramp(steps[-1]), 7) == 0.8999818


def test_official_ramp_in_the_published_order_of_operations():
    # Densities as one types them for the published code; equal to the last bit.
    ramp = Ramp(**IMAGENET, official_rounding=True)
    for index in range(1, 75):
        decay = (1 - (index / 75)) ** 3
        assert ramp(4000 * index) == (1 - 0.5) + (0.5 - 0.2) * (1 - decay)


@pytest.mark.parametrize(
    ("updates", "sparsity", "printed"), [(4, 0.9 - 0.4 / 64, 0.894), (2, 0.9 - 0.4 / 8, 0.851)]
)
def test_official_short_ramp_misses_its_target(updates, sparsity, printed):
    ramp = Ramp(initial=0.5, final=0.9, begin=0, end=10 * updates, every=10, official_rounding=True)
    assert ramp(1000) == pytest.approx(sparsity, abs=1e-15)
    # What a run of the published code reached, its own counting of weights included.
    assert ramp(1000) == pytest.approx(printed, abs=1.1e-3)


@pytest.mark.parametrize(("run", "number"), [(IMAGENET, 75), (CIFAR, 28)])
def test_exact_ramp_lands_on_its_target(run, number):
    ramp = Ramp(**run)
    steps = prunes(ramp, 2 * run["end"])
    assert len(steps) == number
    assert ramp(steps[-1]) == run["final"] == ramp(10**9)
    assert ramp(steps[-2]) < run["final"]
    official = Ramp(**run, official_rounding=True)
    assert [ramp(s) for s in steps[:-1]] == pytest.approx([official(s) for s in steps[:-1]])


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("final", [0.3, 0.7, 0.9, 0.95, 0.98, 1 - 2**-53])
@pytest.mark.parametrize("initial", [0.0, 0.1, 0.3])
def test_ramp_is_monotone(initial, final, official):
    for updates in (2, 3, 7, 1000):
        ramp = Ramp(
            initial=initial,
            final=final,
            begin=0,
            end=updates,
            every=1,
            official_rounding=official,
        )
        values = [ramp(step) for step in range(updates + 2)]
        assert values == sorted(values)
        assert values[0] == pytest.approx(initial, abs=1e-15)
        assert official or (values[0], values[-1]) == (initial, final)


def test_level_ramp_stays():
    ramp = Ramp(initial=0.7, final=0.7, begin=0, end=30, every=10)
    assert {ramp(step) for step in range(50)} == {0.7}


@pytest.mark.parametrize(
    ("begin", "end", "every", "official"),
    [
        (0, 500, 1000, False),
        (0, 0, 1, False),  # step 0 is no update
        (1500, 1900, 1000, False),
        (30, 20, 10, False),
        (0, 1999, 1000, True),  # n = 1
        (2000, 3000, 1000, True),
    ],
)
def test_ramp_refuses_to_hold_no_update(begin, end, every, official):
    message = (
        f"^prune_until: the ramp from step {begin} to {end} holds no update at "
        f"update_every={every}{' and official_rounding=True' if official else ''};"
    )
    with pytest.raises(ValueError, match=message):
        Ramp(initial=0, final=0.9, begin=begin, end=end, every=every, official_rounding=official)


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (0, 30, [10, 20]),  # never step 0, never `stop`
        (10, 31, [10, 20, 30]),
        (11, 40, [20, 30]),
        (20, 20, []),
    ],
)
def test_update_clock(start, stop, expected):
    clock = UpdateClock(every=10, start=start, stop=stop)
    assert [step for step in range(60) if clock.is_update(step)] == expected


@pytest.mark.parametrize(
    ("every", "total", "updates"), [(4000, 100 * 10009, 250), (1000, 160 * 352, 56)]
)
def test_updates_of_the_published_runs(every, total, updates):
    clock = UpdateClock(every=every, start=0, stop=total)
    assert sum(clock.is_update(step) for step in range(total)) == updates


RAMP = {"initial": 0.0, "final": 0.9, "begin": 0, "end": 100, "every": 10}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Constant(value=1.5), r"value: expected a number in \[0, 1\], got 1.5"),
        (
            lambda: CosineDecay(initial=math.nan, total_steps=9),
            r"initial: expected a number in \[0, 1\], got nan",
        ),
        (
            lambda: CosineDecay(initial=0.001, total_steps=9),
            r"initial: expected a number in \[floor=0.005, 1\], got 0.001",
        ),
        (
            lambda: CosineDecay(initial=0.5, floor=-1, total_steps=9),
            r"floor: expected a number in \[0, 1\], got -1",
        ),
        (
            lambda: CosineDecay(initial=0.5, total_steps=0),
            "total_steps: expected an integer of at least 1, got 0",
        ),
        (
            lambda: Ramp(**RAMP | {"final": 1.0}),
            r"final: expected a number in \[0, 1\), got 1",
        ),
        (
            lambda: Ramp(**RAMP | {"initial": -0.1}),
            r"initial: expected a number in \[0, 1\), got -0.1",
        ),
        (
            lambda: Ramp(**RAMP | {"initial": 0.95}),
            "final: expected a sparsity of at least initial=0.95, got 0.9",
        ),
        (
            lambda: Ramp(**RAMP | {"every": 0}),
            "every: expected an integer of at least 1, got 0",
        ),
        (lambda: Ramp(**RAMP | {"begin": -1}), "begin: expected a step of at least 0, got -1"),
        (lambda: Ramp(**RAMP | {"end": -1}), "end: expected a step of at least 0, got -1"),
        (
            lambda: UpdateClock(every=0, start=0, stop=1),
            "every: expected an integer of at least 1, got 0",
        ),
        (
            lambda: UpdateClock(every=1, start=-1, stop=1),
            "start: expected a step of at least 0, got -1",
        ),
        (
            lambda: UpdateClock(every=1, start=5, stop=4),
            "stop: expected a step of at least 5, got 4",
        ),
    ],
)
def test_bad_fields_are_named(build, message):
    with pytest.raises(ValueError, match="^" + message):
        build()


def test_steps_must_be_integers():
    with pytest.raises(TypeError, match=r"^every: expected an integer of at least 1, got 2\.5$"):
        UpdateClock(every=2.5, start=0, stop=10)


# --- curves, and what decays ----------------------------------------------------------------------


@pytest.mark.parametrize("name", CURVES)
def test_curves_rise_from_nothing_to_all(name):
    curve = CURVES[name]
    values = [curve(i / 40) for i in range(41)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(1)
    assert values[0] == (1 if name == "constant" else pytest.approx(0))


@pytest.mark.parametrize(
    ("name", "quarter", "half"),
    [
        ("cubic", 37 / 64, 7 / 8),
        ("linear", 0.25, 0.5),
        ("cosine", 0.5 - math.sqrt(0.125), 0.5),
        ("sigmoid", (1 / (1 + math.exp(3)) - 1 / (1 + math.exp(6))) / math.tanh(3), 0.5),
        ("constant", 1, 1),
    ],
)
def test_a_ramp_follows_its_curve(name, quarter, half):
    ramp = Ramp(initial=0.2, final=0.8, begin=0, end=80, every=10, curve=name)
    assert ramp(0) == 0.2
    assert ramp(20) == pytest.approx(0.2 + 0.6 * quarter)
    assert ramp(40) == pytest.approx(0.2 + 0.6 * half)
    assert ramp(80) == 0.8


def test_a_ramp_follows_a_function_within_its_ends():
    ramp = Ramp(initial=0.2, final=0.8, begin=0, end=80, every=10, curve=lambda p: 4 * p - 1)
    assert [ramp(step) for step in (10, 20, 40, 50, 80)] == pytest.approx([0.2, 0.2, 0.8, 0.8, 0.8])


def test_drop_schedules():
    linear = as_drop_schedule(0.4, "linear", 100)
    assert [linear(step) for step in (0, 50, 100, 120)] == pytest.approx([0.4, 0.2, 0, 0])
    assert as_drop_schedule(0.4, "constant", 100)(77) == 0.4
    assert as_drop_schedule(0.4, "cosine", 100)(100) == 0.005
    assert as_drop_schedule(0.4, "cosine", 100, cosine_floor=0.0)(100) == 0
    assert as_drop_schedule(linear, "cosine", 7) is linear
    assert as_drop_schedule(0.001, "cosine", 100)(50) == 0.001
    with pytest.raises(ValueError, match="drop_schedule: expected one of cosine, linear, constant"):
        as_drop_schedule(0.4, "step", 100)
    with pytest.raises(ValueError, match=r"drop_fraction: expected a number in \[0, 1\], got 1.5"):
        as_drop_schedule(1.5, "cosine", 100)
