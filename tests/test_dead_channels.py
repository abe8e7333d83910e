"""Networks without their dead channels compute the same, and are as narrow as they can be."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from granet.export.dead_channels import remove_dead_channels
from granet.models import create_model
from tests.dead_channels import ignore, kill, removed, settle, stack
from tests.random_networks import random_network
from tests.tiny_runs import tiny, tiny_config  # noqa: F401


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# Small networks, widths by hand


def test_channels_that_are_zero() -> None:
    removal = removed(stack(), 2, 8, 8)
    assert removal.channels == {"0": (6, 4)}
    assert removal.dead == (2, 0)
    assert removal.parameters == (6 * 18 + 4 * 54, 4 * 18 + 4 * 36)
    assert removal.model.get_submodule("1").weight.shape == (4, 4, 3, 3)


@pytest.mark.parametrize(
    ("at_zero", "padding", "left"), [(-0.5, 1, 4), (0.0, 1, 4), (0.5, 1, 6), (0.5, 0, 4)]
)
def test_what_a_batch_norm_makes_of_zero(at_zero: float, padding: int, left: int) -> None:
    model = stack(nn.BatchNorm2d(6), nn.ReLU(), padding=padding)
    settle(model[1], at_zero)
    removal = removed(model, 2, 8, 8)
    assert removal.model.get_submodule("0").weight.size(0) == left
    assert removal.model.get_submodule("1").num_features == left
    has_bias = removal.model.get_submodule("3").bias is not None
    assert has_bias == (at_zero > 0 and left == 4)  # where the constant went


@pytest.mark.parametrize("bias", [-1.0, 2.0])
def test_constants_go_into_a_bias_that_is_there(bias: float) -> None:
    model = stack(nn.Hardswish(), nn.MaxPool2d(3, 2, 1), padding=0, bias=True)
    model[3] = nn.Conv2d(6, 4, 3)
    kill(model[0], bias=bias)
    assert removed(model, 2, 8, 8).channels == {"0": (6, 4)}


def test_padding_that_repeats_the_image_cuts_nothing_off() -> None:
    model = stack(bias=True)
    kill(model[0], bias=2.0)
    assert removed(model, 2, 8, 8).channels == {}
    model[1].padding_mode = "circular"  # type: ignore[assignment]
    model[1]._reversed_padding_repeated_twice = [1] * 4  # type: ignore[assignment]
    assert removed(model, 2, 8, 8).channels == {"0": (6, 4)}


@pytest.mark.parametrize(("counts_padding", "left"), [(True, 6), (False, 4)])
def test_average_pools_may_take_zeros_in(counts_padding: bool, left: int) -> None:
    pool = nn.AvgPool2d(3, 2, padding=1, count_include_pad=counts_padding)
    model = stack(pool, padding=0, bias=True)
    kill(model[0], bias=2.0)
    removal = removed(model, 2, 10, 10)
    assert removal.model.get_submodule("0").weight.size(0) == left


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.adaptive_avg_pool2d(x, 4),
        lambda x: F.adaptive_max_pool2d(x, 4),
        lambda x: x[:, :, ::2, 1:],
        lambda x: F.dropout(F.gelu(x), 0.5, False),
    ],
)
def test_functions_that_keep_constants(pool: Callable[[Tensor], Tensor]) -> None:
    net = pair(lambda net, x: net.c(pool(net.a(x))))
    net.a = nn.Conv2d(2, 6, 3)
    kill(net.a, bias=2.0)
    assert removed(net, 2, 8, 8).channels == {"a": (6, 4)}


def test_a_scale_of_zero_makes_a_constant() -> None:
    model = stack(nn.BatchNorm2d(6), padding=0)
    nn.init.normal_(model[0].weight)  # type: ignore[arg-type]
    settle(model[1])
    with torch.no_grad():
        model[1].weight[2] = 0.0  # type: ignore[index]
    assert removed(model, 2, 8, 8).channels == {"0": (6, 5)}


def test_channels_that_nobody_reads_and_what_feeds_only_those() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 3, 3),
        nn.Flatten(),
    )
    ignore(model[4])
    with torch.no_grad():
        others = [0, 2, 4, 5]
        model[2].weight[others, 5] = 0.0  # type: ignore[index, operator]
    assert removed(model, 2, 8, 8).channels == {"0": (6, 5), "2": (6, 4)}


def test_constants_travel_through_layers() -> None:
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 3)
    )
    kill(model[0], bias=2.0)
    with torch.no_grad():
        model[2].weight[2, [0, 2, 4, 5]] = 0.0  # type: ignore[index, operator]
    assert removed(model, 4).channels == {"0": (6, 4), "2": (6, 5)}


def test_a_channel_is_left_of_each_tensor() -> None:
    model = stack(nn.ReLU())
    kill(model[0], list(range(6)))
    model[4] = nn.Flatten()
    model.append(nn.Linear(4, 2))
    assert removed(model, 2, 8, 8).channels == {"0": (6, 1), "2": (4, 1)}


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: x.flatten(1),
        lambda x: torch.flatten(x, 1),
        lambda x: x.view(x.size(0), -1),
        lambda x: x.reshape(x.shape[0], -1),
        lambda x: x.reshape(x.size()[0], -1),
    ],
)
def test_flattened_images(flatten: Callable[[Tensor], Tensor]) -> None:
    net = Net(lambda net, x: net.c(flatten(F.relu(net.a(x)))))
    net.a, net.c = nn.Conv2d(2, 6, 3), nn.Linear(6 * 16, 3)
    kill(net.a, bias=2.0)
    removal = removed(net, 2, 6, 6)
    assert removal.channels == {"a": (6, 4)}
    assert removal.model.get_submodule("c").in_features == 64


def test_widths_that_forward_asks_for_stay() -> None:
    net = pair(lambda net, x: (lambda y: net.c(y) / y.shape[1])(net.a(x)))
    kill(net.a)
    assert removed(net, 2, 8, 8).channels == {}


def test_depthwise_convolutions_follow() -> None:
    depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    model = stack(depthwise, nn.BatchNorm2d(6), nn.ReLU6(), padding=0)
    settle(model[2])
    kill(depthwise, [5], bias=1.0)
    removal = removed(model, 2, 8, 8)
    assert removal.channels == {"0": (6, 3), "1": (6, 3)}
    assert removal.model.get_submodule("1").groups == 3


def test_other_groups_stay() -> None:
    assert removed(stack(nn.Conv2d(6, 6, 3, groups=2)), 2, 8, 8).channels == {}


class Net(nn.Module):
    """Parts, and a forward that is given."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def pair(forward: Callable[[Net, Tensor], Tensor], width: int = 6) -> Net:
    """Two convolutions and a reader."""
    return Net(
        forward,
        a=nn.Conv2d(2, 6, 3, bias=False),
        b=nn.Conv2d(2, 6, 3, bias=False),
        c=nn.Conv2d(width, 3, 3),
    )


@pytest.mark.parametrize(("both", "expected"), [(False, {}), (True, {"a": (6, 4), "b": (6, 4)})])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_sum_loses_what_both_have_lost(
    both: bool, expected: dict[str, tuple[int, int]], in_place: bool
) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y, z = net.a(x), net.b(x)
        if in_place:
            y += z
        else:
            y = y + z
        result: Tensor = net.c(F.relu(y, inplace=in_place)).flatten(1)
        return result

    net = pair(forward)
    kill(net.a)
    if both:
        kill(net.b)
    assert removed(net, 2, 8, 8).channels == expected


def test_a_product_is_zero_where_a_factor_is() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        result: Tensor = net.c(net.a(x) * net.b(x).mean((2, 3), keepdim=True).sigmoid())
        return result

    net = pair(forward)
    kill(net.a)
    assert removed(net, 2, 8, 8).channels == {"a": (6, 4), "b": (6, 4)}


def test_concatenated_channels_have_their_places() -> None:
    net = pair(lambda net, x: net.c(F.relu(torch.cat([net.a(x), net.b(x)], 1))), width=12)
    kill(net.a)
    kill(net.b, [5])
    removal = removed(net, 2, 8, 8)
    assert removal.channels == {"a": (6, 4), "b": (6, 5)}
    assert removal.model.get_submodule("c").in_channels == 9


def test_channels_of_zeros_that_a_network_appends() -> None:
    net = pair(lambda net, x: net.c(net.a(x) + F.pad(net.b(x), (0, 0, 0, 0, 1, 2))))
    net.b = nn.Conv2d(2, 3, 3)
    kill(net.a, [0, 1, 5])
    kill(net.b, [0])
    assert removed(net, 2, 8, 8).channels == {"a": (6, 3), "b": (3, 2)}


def test_zeros_around_an_image_end_a_constant() -> None:
    net = pair(lambda net, x: net.c(F.pad(net.a(x), (1, 1, 1, 1))))
    net.a = nn.Conv2d(2, 6, 3)
    kill(net.a, bias=1.0)
    kill(net.a, [5], bias=0.0)
    assert removed(net, 2, 8, 8).channels == {"a": (6, 5)}


def test_what_is_written_over_is_not_what_it_was() -> None:
    """A constant of -1 is 0 once its ReLU has been computed in place."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        z = y[:, :, 1:, 1:]
        net.relu(z)
        result: Tensor = net.c(y).flatten(1)
        return result

    net = pair(forward)
    net.a, net.relu = nn.Conv2d(2, 6, 3), nn.ReLU(inplace=True)
    kill(net.a, bias=-1.0)
    assert removed(net, 2, 8, 8).channels == {}


def test_what_is_not_understood_keeps_its_channels() -> None:
    for function in (
        lambda x: x.flip(1),
        lambda x: torch.cat([x[:, 1:], x[:, :1]], 1),
        lambda x: torch.cat([x, x], 2),
        lambda x: x.cumsum(1),
        lambda x: x.chunk(2, 1)[0].repeat(1, 2, 1, 1),
        lambda x: x.mean(1, keepdim=True).expand(-1, 6, -1, -1),
        lambda x: x[:, [0, 0, 1, 2, 3, 4]],
        lambda x: x.softmax(1),
        lambda x: x + torch.ops.aten.alias(x),
    ):
        net = pair(lambda net, x, function=function: net.c(function(net.a(x))))  # type: ignore[misc]
        kill(net.a)
        assert "a" not in removed(net, 2, 8, 8).channels


@pytest.mark.parametrize("over", [(1, 2), (1,), 1, (-3, 3)])
def test_a_mean_over_channels_is_none_of_them(over: tuple[int, ...]) -> None:
    net = pair(lambda net, x: net.c(net.a(x).mean(over).flatten(1)))
    net.c = nn.Linear(6 if isinstance(over, tuple) and len(over) > 1 else 36, 3)
    kill(net.a)
    assert removed(net, 2, 8, 8).channels == {}


def test_layers_in_two_places_keep_their_channels() -> None:
    net = pair(lambda net, x: net.c(net.a(x) + net.a(2 * x)))
    kill(net.a)
    assert removed(net, 2, 8, 8).channels == {}
    net = pair(lambda net, x: net.c(net.a(x)) + net.d(net.b(x)))
    net.b.weight, net.d = net.a.weight, nn.Conv2d(6, 3, 3)  # type: ignore[union-attr]
    kill(net.a)
    assert removed(net, 2, 8, 8).channels == {}


def test_the_output_keeps_its_channels() -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU())
    kill(model[0])
    assert removed(model, 2, 8, 8).channels == {}


def test_hidden_units_between_tokens() -> None:
    model = nn.Sequential(
        nn.LayerNorm(4), nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4), nn.LayerNorm(4)
    )
    kill(model[1], bias=0.7)
    assert removed(model, 5, 4).channels == {"1": (6, 4)}


# Whole networks

HIDDEN = {
    "resnet_tiny": r"blocks\.\d\.conv1",
    "resnet20": r"blocks\.\d\.conv1",
    "vgg19_cifar": r"features\.\d+",
    "wrn16_8": r"blocks\.\d\.conv1",
    "resnet18": r"layer\d\.\d\.conv1",
    "mobilenet_v2": r"features\.([2-9]|1[0-7])\.conv\.0\.0",
    "densenet121": r"features\.denseblock\d\.denselayer\d+\.conv1",
}
"""Convolutions whose channels go nowhere but through a batch norm and a ReLU into the next."""


def network(name: str) -> tuple[nn.Module, dict[str, int]]:
    """With every third channel of every convolution dead, and how many are alive where they can go."""
    model = create_model(name, num_classes=10)
    alive = {}
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            settle(module, -1.0, list(range(0, module.num_features, 3)))
    for layer_name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            dead = list(range(0, module.out_channels, 3))
            kill(module, dead)
            if re.fullmatch(HIDDEN[name], layer_name):
                alive[layer_name] = module.out_channels - len(dead)
    return model, alive


@pytest.mark.parametrize("name", HIDDEN)
def test_networks(name: str) -> None:
    if not name.startswith(("resnet_tiny", "resnet20", "wrn")):
        pytest.importorskip("torchvision")
    model, alive = network(name)
    removal = removed(model, 3, 32, 32)
    assert alive
    for layer, count in alive.items():
        assert removal.channels[layer][1] == count, layer
    assert removal.dead[1] < removal.dead[0]
    again = remove_dead_channels(removal.model, (3, 32, 32))
    assert again.channels == {}


def test_random_networks() -> None:
    count = 0
    for seed in range(60):
        network = random_network(seed)
        removal = remove_dead_channels(network, (3, 10, 10))
        images = 3 * torch.randn(4, 3, 10, 10).double()
        with torch.no_grad():
            expected, result = network(images), removal.model(images)
        assert torch.allclose(result, expected, rtol=0, atol=1e-9 * float(expected.abs().max())), (
            seed
        )
        count += sum(before - after for before, after in removal.channels.values())
    assert count > 300
