"""The engine and GraNet: when masks change, exactly how many weights stay, and resuming."""

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn

from granet import METHODS, GraNet
from granet.schedules import Constant
from granet_kernels import MaskedSGD, masked_layers, sparsify, use_backend

STEPS = 60
SETTINGS = {"sparsity": 0.9, "initial_sparsity": 0.5, "total_steps": STEPS, "update_every": 5}


@pytest.fixture(autouse=True)
def reference_backend():
    with use_backend("reference"):
        yield


def network(memory_format=torch.contiguous_format):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.LeakyReLU(),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    return sparsify(model).to(memory_format=memory_format)


def sgd(model):
    return MaskedSGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.randint(
        10, (8,), generator=generator
    )


def train(model, optimizer, sparsifier, start=0, stop=STEPS):
    for step in range(start, stop):
        x, y = batch(step)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()


def run(make_optimizer=sgd, memory_format=torch.contiguous_format, **settings):
    model = network(memory_format)
    optimizer = make_optimizer(model)
    sparsifier = GraNet(model, optimizer, **(SETTINGS | settings))
    train(model, optimizer, sparsifier)
    return model, optimizer, sparsifier


def everything(model, optimizer, sparsifier):
    """All tensors that make up the state of a run, by name."""
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, entries in optimizer.state_dict()["state"].items():
        state |= {
            f"optimizer.{index}.{name}": torch.as_tensor(v)
            for name, v in entries.items()
            if v is not None
        }
    state |= {f"masks.{name}": mask for name, mask in sparsifier.state_dict()["masks"].items()}
    return state | {"generator": sparsifier.state_dict()["generator"]}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("initial_sparsity", [0.0, 0.5])
@pytest.mark.parametrize("distribution", ["erk", "uniform"])
@pytest.mark.parametrize("sparsity", [0.9, 0.977])
def test_ends_with_exactly_the_target(scope, initial_sparsity, distribution, sparsity):
    settings = {"initial_sparsity": initial_sparsity, "scope": scope, "sparsity": sparsity}
    model, _, sparsifier = run(distribution=distribution, **settings)
    numel = sum(layer.weight.numel() for layer in masked_layers(model).values())
    assert sparsifier.target_active == numel - round(numel * sparsity)
    assert sum(sparsifier.active_counts()) == sparsifier.target_active
    assert sum(int(layer.weight.count_nonzero()) for layer in masked_layers(model).values()) == (
        sparsifier.target_active
    )
    assert sparsifier.sparsity == sparsity


@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_starts_with_exactly_the_initial_sparsity(distribution):
    model = network()
    sparsifier = GraNet(model, sgd(model), **(SETTINGS | {"distribution": distribution}))
    assert sum(sparsifier.active_counts()) == sparsifier.numel - round(sparsifier.numel * 0.5)
    for layer in masked_layers(model).values():
        assert not layer.weight[~layer.mask].any()


def test_seed_decides_the_initial_masks():
    masks = []
    for seed in (1, 1, 2):
        model = network()
        GraNet(model, sgd(model), **SETTINGS, seed=seed)
        masks.append(torch.cat([layer.packed_mask for layer in masked_layers(model).values()]))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_follows_the_ramp_at_every_update():
    model = network()
    optimizer = sgd(model)
    sparsifier = GraNet(model, optimizer, **SETTINGS)
    seen = {}
    for step in range(STEPS):
        train(model, optimizer, sparsifier, step, step + 1)
        seen[step + 1] = sum(sparsifier.active_counts())
    for step, active in seen.items():
        update = min(step // 5, 6)  # prune_until="50%": the sixth update
        progress = 1 - (1 - update / 6) ** 3
        assert active == sparsifier.numel - round(sparsifier.numel * (0.5 + 0.4 * progress)), step


def test_drops_and_regrows_between_and_after_prunes():
    model = network()
    optimizer = sgd(model)
    sparsifier = GraNet(model, optimizer, **SETTINGS)
    changed = []
    for step in range(STEPS):
        before = [layer.mask for layer in sparsifier.layers.values()]
        train(model, optimizer, sparsifier, step, step + 1)
        after = [layer.mask for layer in sparsifier.layers.values()]
        if any((new & ~old).any() for old, new in zip(before, after, strict=True)):
            changed.append(step + 1)
    assert changed == list(range(5, STEPS, 5))  # every update regrows; the last step is none


def test_step_says_whether_it_was_an_update():
    model = network()
    optimizer = sgd(model)
    sparsifier = GraNet(model, optimizer, **SETTINGS)
    assert sparsifier.step() is False  # no optimizer step was taken
    assert sparsifier.steps == 0
    updates = []
    for step in range(10):
        x, y = batch(step)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        updates.append(sparsifier.step())
        optimizer.zero_grad()
    assert updates == [step % 5 == 4 for step in range(10)]
    assert sparsifier.steps == 10


def test_prune_from_delays_the_first_update():
    model = network()
    optimizer = sgd(model)
    sparsifier = GraNet(model, optimizer, **SETTINGS, prune_from="25%")  # step 15
    before = {name: layer.mask for name, layer in sparsifier.layers.items()}
    train(model, optimizer, sparsifier, 0, 14)
    assert all(torch.equal(layer.mask, before[name]) for name, layer in sparsifier.layers.items())
    train(model, optimizer, sparsifier, 14, 15)
    assert not all(
        torch.equal(layer.mask, before[name]) for name, layer in sparsifier.layers.items()
    )


def test_gradients_are_dense_for_the_step_before_an_update_alone():
    model = network()
    optimizer = sgd(model)
    sparsifier = GraNet(model, optimizer, **SETTINGS)
    layer = next(iter(sparsifier.layers.values()))
    dense = []
    for step in range(11):
        x, y = batch(step)
        nn.functional.cross_entropy(model(x), y).backward()
        dense.append(bool(layer.weight.grad[~layer.mask].any()))
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
    assert dense == [step % 5 == 4 for step in range(11)]


OPTIMIZERS = {
    "MaskedSGD": sgd,
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_inactive_weights_and_their_state_stay_zero(name):
    _model, optimizer, sparsifier = run(OPTIMIZERS[name])
    assert sum(sparsifier.active_counts()) == sparsifier.target_active
    for layer in sparsifier.layers.values():
        inactive = ~layer.mask
        assert not layer.weight[inactive].any()
        for key, state in optimizer.state[layer.weight].items():
            if torch.is_tensor(state) and state.shape == layer.weight.shape:
                assert not state[inactive].any(), key


def test_masked_sgd_trains_as_torch_sgd_does():
    ours, theirs = run(OPTIMIZERS["MaskedSGD"])[0], run(OPTIMIZERS["SGD"])[0]
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


RESUME = {
    "sgd": {},
    "layer-scope": {"scope": "layer"},
    "dense-start": {"initial_sparsity": 0.0},
    "adamw": {"make_optimizer": OPTIMIZERS["AdamW"]},
    "channels-last": {"memory_format": torch.channels_last},
    "official": {"official_rounding": True},
}


@pytest.mark.parametrize("case", RESUME)
def test_resumes_bit_for_bit_at_any_step(case):
    settings = dict(RESUME[case])
    make_optimizer = settings.pop("make_optimizer", sgd)
    memory_format = settings.pop("memory_format", torch.contiguous_format)
    expected = everything(*run(make_optimizer, memory_format, **settings))
    model = network(memory_format)
    optimizer = make_optimizer(model)
    sparsifier = GraNet(model, optimizer, **(SETTINGS | settings))
    for step in range(STEPS):  # stopped and resumed at every single step
        train(model, optimizer, sparsifier, step, step + 1)
        saved = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict(), sparsifier.state_dict()], saved)
        saved.seek(0)
        loaded = torch.load(saved, weights_only=True)
        torch.manual_seed(
            step
        )  # a new process has another random state, and a new seed does not matter
        model = network(memory_format)
        optimizer = make_optimizer(model)
        sparsifier = GraNet(model, optimizer, **(SETTINGS | settings), seed=99)
        for part, state in zip((model, optimizer, sparsifier), loaded, strict=True):
            part.load_state_dict(state)
    assert_same(everything(model, optimizer, sparsifier), expected)


def test_channels_last_trains_the_same_network():
    """To rounding: convolution sums in another order."""
    model, _, sparsifier = run(memory_format=torch.channels_last)
    assert sum(sparsifier.active_counts()) == sparsifier.target_active
    assert model[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_step_skipped_by_the_scaler_does_not_count():
    model = network()
    optimizer = sgd(model)
    sparsifier = GraNet(model, optimizer, **SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        x, y = batch(step)
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        if step == 1:
            model[5].weight.grad[0, 0] = float("inf")
        weights = copy.deepcopy(model.state_dict())
        scaler.step(optimizer)
        scaler.update()
        assert sparsifier.step() is False
        optimizer.zero_grad()
        if step == 1:
            assert all(torch.equal(v, weights[n]) for n, v in model.state_dict().items())
    assert sparsifier.steps == 2


def test_frozen_and_unused_layers_keep_their_masks():
    model = network()
    model[3].weight.requires_grad_(False)
    optimizer = MaskedSGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    sparsifier = GraNet(model, optimizer, **(SETTINGS | {"sparsity": 0.5}))
    before = model[3].mask
    train(model, optimizer, sparsifier)
    assert torch.equal(model[3].mask, before)


def test_zero_grad_before_step_is_an_error_that_says_so():
    model = network()
    optimizer = sgd(model)
    sparsifier = GraNet(model, optimizer, **(SETTINGS | {"update_every": 1}))
    model(batch(0)[0]).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = sparsifier.active_counts()
    with pytest.raises(RuntimeError, match=r"before zero_grad\(\)"):
        sparsifier.step()
    assert sparsifier.active_counts() == before
    assert sparsifier.steps == 0


def test_official_rounding_reproduces_the_published_counts():
    """k = int(N (1 - s)) - 1 of N stay after a prune; the ramp ends one prune short of its target."""
    _model, _, sparsifier = run(official_rounding=True)
    last = 0.5 + 0.4 * (
        1 - (1 - 5 / 6) ** 3
    )  # six updates in the ramp, the last prune at progress 5/6
    assert sum(sparsifier.active_counts()) == int(sparsifier.numel * (1 - last)) - 1
    assert sparsifier.clock.is_update(STEPS)


def test_drop_fraction_may_be_a_schedule():
    _, _, sparsifier = run(drop_fraction=Constant(value=0.2))
    assert sparsifier.plan.drop_fraction(7) == 0.2
    _, _, sparsifier = run(drop_fraction=0.0)
    assert sum(sparsifier.active_counts()) == sparsifier.target_active


def test_a_model_sparser_than_the_target_is_refused():
    model = network()
    for layer in masked_layers(model).values():
        layer.mask = torch.zeros(layer.weight.shape, dtype=torch.bool).index_fill_(
            0, torch.tensor([0]), True
        )
    optimizer = sgd(model)
    with pytest.raises(ValueError, match=r"model: expected at least .* active weights"):
        GraNet(model, optimizer, sparsity=0.5, total_steps=STEPS, update_every=5)
    assert not optimizer._optimizer_step_post_hooks


def test_a_refused_or_removed_sparsifier_leaves_no_hook():
    model = network()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match="largest feasible"):
        GraNet(model, optimizer, **(SETTINGS | {"sparsity": 0.9999}))
    assert not optimizer._optimizer_step_post_hooks
    sparsifier = GraNet(model, optimizer, **SETTINGS)
    sparsifier.remove()
    train(model, optimizer, sparsifier, 0, 10)
    assert sparsifier.steps == 0


def test_copies_go_on_pruning():
    """An optimizer loses its hooks when it is copied."""
    parts = network()
    parts = (parts, optimizer := sgd(parts), GraNet(parts, optimizer, **SETTINGS))
    train(*parts, 0, 7)
    for copied in (copy.deepcopy(parts), pickle.loads(pickle.dumps(parts))):
        train(*copied, 7)
        assert sum(copied[2].active_counts()) == copied[2].target_active
        assert copied[2].steps == STEPS


def test_stepping_another_optimizer_is_noticed():
    model = network()
    sparsifier = GraNet(model, sgd(model), **SETTINGS)
    train(model, sgd(model), sparsifier)
    with pytest.warns(UserWarning, match="is another optimizer being stepped"):
        train(model, sgd(model), sparsifier)


def test_growth_scores_of_a_shared_weight_are_whole():
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    model = sparsify(nn.Sequential(first, nn.ReLU(), second))
    GraNet(model, sgd(model), sparsity=0.5, total_steps=9, update_every=1, initial_sparsity=0.4)
    dense = copy.deepcopy(model)
    x = torch.randn(4, 6)
    model(x).square().sum().backward()
    weight = (dense[0].weight * dense[0].mask).detach().requires_grad_()
    hidden = nn.functional.linear(x, weight, dense[0].bias).relu()
    nn.functional.linear(hidden, weight, dense[2].bias).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, weight.grad)


def test_methods_are_registered():
    assert METHODS["granet"] is GraNet


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.0}, "sparsity: expected a number in [0, 1), got 1.0"),
        ({"sparsity": -0.1}, "sparsity: expected a number in [0, 1), got -0.1"),
        ({"initial_sparsity": 0.95}, "initial_sparsity: expected at most sparsity, 0.9, got 0.95"),
        ({"floor": -1}, "floor: expected an integer of at least 0, got -1"),
        ({"ramp": "steep"}, "ramp: expected one of cubic, linear, cosine, sigmoid, constant, or a"),
        ({"drop": "largest"}, "drop: expected one of magnitude, sign, random, got 'largest'"),
        (
            {"grow": "magnitude"},
            "grow: expected one of gradient, momentum, random, got 'magnitude'",
        ),
        ({"redistribution": "all"}, "redistribution: expected one of none, magnitude, momentum"),
        ({"regrown": "old"}, "regrown: expected one of keep, zero, layer_mean, got 'old'"),
        ({"drop_schedule": "step"}, "drop_schedule: expected one of cosine, linear, constant"),
        ({"init": "zeros"}, "init: expected 'masks' or 'from_zeros', got 'zeros'"),
        ({"sparsity": 0.9999}, "largest feasible sparsity: 0.99"),
        (
            {"total_steps": 4},
            "prune_until: the ramp from step 0 to 2 holds no update at update_every=5",
        ),
        ({"update_every": 0}, "update_every: expected at least 1 step, got 0"),
        ({"prune_until": "half"}, "prune_until: expected a step or a percentage"),
        ({"prune_until": 61}, "prune_until: expected a step in [0, 60], got 61"),
        ({"distribution": "er-k"}, "distribution: expected one of erk, er, uniform"),
        ({"scope": "local"}, "scope: expected 'global' or 'layer', got 'local'"),
        ({"drop_fraction": 1.5}, "drop_fraction: expected a number in [0, 1], got 1.5"),
    ],
)
def test_bad_settings_change_nothing(change, message):
    model = network()
    optimizer = sgd(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=re.escape(message)):
        GraNet(model, optimizer, **(SETTINGS | change))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_dense_model_is_refused():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"model: expected masked layers.*sparsify"):
        GraNet(model, torch.optim.SGD(model.parameters()), **SETTINGS)


def test_an_optimizer_of_other_parameters_is_refused():
    with pytest.raises(ValueError, match=r"optimizer: .* without 0.weight"):
        GraNet(network(), sgd(network()), **SETTINGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(method="rigl"), "expected method 'granet', got 'rigl'"),
        (
            lambda s: s["settings"].update(sparsity=0.8),
            "expected settings['sparsity'] 0.9, got 0.8",
        ),
        (lambda s: s["masks"].pop("0"), "expected layers"),
        (
            lambda s: s["masks"].update({"0": torch.zeros(16, dtype=torch.uint8)}),
            "masks['0']: expected",
        ),
        (lambda s: s.update(version=99), "expected version 2, got 99"),
        (lambda s: s.pop("steps"), "steps"),
        (lambda s: s.update(steps="7"), "expected steps from 0 to 60, got '7'"),
        (lambda s: s.update(steps=-1), "expected steps from 0 to 60, got -1"),
        (lambda s: s.update(generator=None), "expected the generator's state"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    _model, _, sparsifier = run()
    state = copy.deepcopy(sparsifier.state_dict())
    change(state)
    fresh = network()
    target = GraNet(fresh, sgd(fresh), **SETTINGS)
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(ValueError, match=re.escape(message)):
        target.load_state_dict(state)
    assert target.steps == 0
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


def test_compiled_model_trains_through_updates_without_recompiling():
    model = network()
    optimizer = sgd(model)
    sparsifier = GraNet(model, optimizer, **SETTINGS)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    train(compiled, optimizer, sparsifier, 0, 2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(compiled, optimizer, sparsifier, 2, STEPS)
    counters = torch._dynamo.utils.counters
    assert (counters["stats"]["unique_graphs"], dict(counters["graph_break"])) == (1, {})
    assert_same(everything(model, optimizer, sparsifier), everything(*run()))
