"""FLOPs against counts by hand and the published numbers of ResNet-50."""

import json

import pytest
import torch
import torchvision
from torch import nn

from granet.distributions import erk
from granet.flops import TrainingFlops, inference_flops, measure


@pytest.fixture(scope="module")
def resnet50():
    with torch.device("meta"):
        return torchvision.models.resnet50()


@pytest.fixture(scope="module")
def resnet50_flops(resnet50):
    return measure(resnet50, (3, 224, 224))


class LikeAMaskedConv2d(nn.Conv2d):
    """A subclass with state and a forward pass of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", torch.ones(self.weight.shape, dtype=torch.bool))

    def forward(self, input):
        return nn.functional.conv2d(
            input, self.weight * self.mask, self.bias, self.stride, self.padding
        )


@pytest.mark.parametrize(
    ("layer", "shape", "flops"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (3, 5, 7), 2 * 3 * 9 * 8 * 35),
        (nn.Conv2d(3, 8, 3, stride=2, bias=False), (3, 5, 7), 2 * 3 * 9 * 8 * 2 * 3),
        (nn.Conv2d(4, 8, (1, 3), groups=2), (4, 5, 5), 2 * 2 * 3 * 8 * 5 * 3),
        (nn.Conv2d(6, 6, 3, groups=6, dilation=2), (6, 9, 9), 2 * 1 * 9 * 6 * 25),
        (nn.Conv1d(3, 4, 5), (3, 9), 2 * 3 * 5 * 4 * 5),
        (nn.Conv3d(2, 3, 2), (2, 3, 4, 5), 2 * 2 * 8 * 3 * 2 * 3 * 4),
        # Each of the 9 input positions meets every weight, at any stride.
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 3, 3), 2 * 4 * 3 * 9 * 9),
        (nn.Linear(10, 4), (10,), 2 * 10 * 4),
        (nn.Linear(10, 4), (7, 10), 2 * 10 * 4 * 7),  # tokens
        (nn.Linear(10, 4), (2, 7, 10), 2 * 10 * 4 * 14),
        (LikeAMaskedConv2d(3, 8, 3), (3, 5, 7), 2 * 3 * 9 * 8 * 15),
        (nn.Conv2d(3, 8, 3, dtype=torch.float16), (3, 5, 7), 2 * 3 * 9 * 8 * 15),
        (nn.BatchNorm2d(3), (3, 5, 5), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_one_layer(layer, shape, flops):
    assert measure(layer, shape) == ({} if flops is None else {"": flops})


def test_layers_are_named_in_order_and_counted_per_call():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(1, 2, 3, padding=1)
            self.twice = nn.Conv2d(2, 2, 1)
            self.idle = nn.Linear(5, 5)
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(32, 3))

        def forward(self, x):
            return self.head(self.twice(self.twice(self.stem(x))))

    flops = measure(Net(), (1, 4, 4))
    expected = {"stem": 2 * 9 * 2 * 16, "twice": 2 * 2 * 4 * 16, "idle": 0, "head.1": 2 * 96}
    assert list(flops.items()) == list(expected.items())


def test_a_shared_weight_counts_under_its_first_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert measure(model, (4,)) == {"0": 64, "1": 32}


def test_parametrized_weights_are_not_taken_for_shared():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)))
    for layer in model:
        nn.utils.parametrizations.weight_norm(layer)
    assert measure(model, (4,)) == {str(index): 32 for index in range(20)}


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_projections_count(batch_first):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=batch_first)

        def forward(self, x):  # 5 queries, 3 keys
            query = x if batch_first else x.transpose(0, 1)
            key, value = query.new_zeros(2, 1, 3, 6)[0], query.new_zeros(1, 3, 4)
            if not batch_first:
                key, value = key.transpose(0, 1), value.transpose(0, 1)
            return self.attention(query, key, value=value)[0]

    assert measure(Net(), (5, 8)) == {
        "attention": 2 * 8 * (5 * 8 + 3 * 6 + 3 * 4),
        "attention.out_proj": 2 * 8 * 8 * 5,
    }


def test_vision_transformer():
    with torch.device("meta"):
        model = torchvision.models.vit_b_16()
    flops = measure(model, (3, 224, 224))
    tokens, width = 197, 768
    block = 2 * tokens * width * width * (3 + 1 + 4 + 4)
    assert sum(flops.values()) == (2 * 196 * (3 * 256) * width + 12 * block + 2 * width * 1000)


def test_resnet50_layers_and_dense_flops(resnet50, resnet50_flops):
    weights = [resnet50.get_submodule(name).weight for name in resnet50_flops]
    assert len(weights) == 54
    assert sum(weight.numel() for weight in weights) == 25_502_912
    assert f"{sum(resnet50_flops.values()):.3e}" == "8.178e+09"


@pytest.mark.parametrize(
    ("sparsity", "ratio"), [(0.5, 0.714), (0.8, 0.414), (0.9, 0.242), (0.95, 0.122)]
)
def test_resnet50_erk_flops(resnet50, resnet50_flops, sparsity, ratio):
    shapes = [resnet50.get_submodule(name).weight.shape for name in resnet50_flops]
    fractions = dict(zip(resnet50_flops, erk(shapes, sparsity), strict=True))
    flops = inference_flops(resnet50_flops, fractions)
    assert round(flops / sum(resnet50_flops.values()), 3) == ratio
    assert sparsity != 0.5 or f"{flops:.4e}" == "5.8415e+09"


def test_resnet50_training_flops(resnet50_flops):
    # 100 epochs of 1 281 152 samples; the papers print 3.2e18, from 8.2e9 a sample.
    meter = TrainingFlops(resnet50_flops)
    meter.add({}, 100 * 1_281_152)
    assert f"{meter.dense_total:.3e}" == "3.143e+18"
    assert meter.sparse_total == pytest.approx(meter.dense_total, rel=1e-15)


class Awkward(nn.Module):
    """Everything a forward pass could disturb: mode, statistics, random numbers, gradients."""

    def __init__(self, reads_values: bool):
        super().__init__()
        self.reads_values = reads_values
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.frozen = nn.BatchNorm2d(4).eval()
        self.forwards = 0

    def forward(self, x):
        self.forwards += 1
        torch.rand(3)
        x = nn.functional.dropout(self.frozen(self.norm(self.conv(x))), 0.5, training=True)
        if self.reads_values and x.sum().item() > 1e9:
            return self.norm(x)
        return x


@pytest.mark.parametrize("reads_values", [False, True], ids=["meta", "copy"])
def test_the_model_and_the_generators_stay_as_they_are(reads_values):
    torch.manual_seed(0)
    model = Awkward(reads_values)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    assert measure(model, (3, 6, 6)) == {"conv": 2 * 27 * 4 * 16}
    assert torch.equal(torch.get_rng_state(), generator)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name  # refuses a tensor moved to meta
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert model.forwards == 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_copy_holds_no_weights(monkeypatch):
    seen = []
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    monkeypatch.setattr(nn.Sequential, "forward", lambda self, x: seen.append((self, x)))
    measure(model, (4,))
    [(copied, x)] = seen
    assert copied is not model
    assert x.device.type == "meta"
    assert {tensor.device.type for tensor in copied.state_dict().values()} == {"meta"}


def test_the_pass_is_in_evaluation_mode():
    # In training mode normalisation refuses a batch of one.
    assert measure(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), (4,)) == {"0": 32}


def test_a_wrong_sample_shape_is_an_error():
    with pytest.raises(RuntimeError, match="shapes"):
        measure(nn.Linear(4, 4), (5,))


def test_inference_flops_by_hand():
    assert inference_flops({"a": 100, "b": 10}, {"a": 0.25}) == 35.0
    assert inference_flops({"a": 100, "b": 10}, {}) == 110.0
    assert inference_flops({"a": 100}, {"a": 0.0}) == 0.0
    assert inference_flops({}, {}) == 0.0


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({"c": 0.5}, r"active_fraction: expected layers among a, b, got 'c'$"),
        ({"a": 1.5}, r"active_fraction\['a'\]: expected a number in \[0, 1\], got 1.5$"),
    ],
)
def test_inference_flops_names_bad_fractions(fractions, message):
    with pytest.raises(ValueError, match=r"^" + message):
        inference_flops({"a": 100, "b": 10}, fractions)


def test_training_flops_accumulate_and_resume():
    meter = TrainingFlops({"a": 100, "b": 10})
    meter.add({"a": 0.5}, 4)
    assert (meter.dense_total, meter.sparse_total) == (3 * 110 * 4, 3 * 60 * 4)
    state = json.loads(json.dumps(meter.state_dict()))
    meter.add({"a": 0.3, "b": 0.7}, 1)

    resumed = TrainingFlops({"a": 100, "b": 10})
    resumed.load_state_dict(state)
    resumed.add({"a": 0.3, "b": 0.7}, 1)
    assert resumed.state_dict() == meter.state_dict()
    assert resumed.sparse_total == pytest.approx(3 * (60 * 4 + 37))


def test_training_flops_refuse_what_does_not_fit():
    meter = TrainingFlops({"a": 100, "b": 10})
    meter.add({}, 1)
    before = meter.state_dict()
    with pytest.raises(ValueError, match=r"^samples: expected an integer of at least 0, got -1$"):
        meter.add({}, -1)
    with pytest.raises(ValueError, match="got 'c'"):
        meter.add({"c": 0.5}, 1)
    with pytest.raises(ValueError, match=r"^state: expected the FLOPs of this network, 110 over 2"):
        meter.load_state_dict(TrainingFlops({"a": 100}).state_dict())
    with pytest.raises(ValueError, match=r"^state: expected the key 'dense_total', got "):
        meter.load_state_dict({"dense": {}, "sparse_total": 0.0})
    assert meter.state_dict() == before
