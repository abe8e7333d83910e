"""The models: shapes, sizes, the published weight counts, and what is refused."""

import sys

import pytest
import torch
from torch import nn

from granet.models import create_model


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "in_channels", "size", "expected"),
    [
        # LeCun et al. (1998): 784 * 300 + 300 * 100 + 100 * 10 weights, and 410 biases.
        ("lenet_300_100", 1, 28, 266_610),
        ("resnet_tiny", 1, 8, 75_002),
        ("resnet_tiny_s2", 3, 32, 75_290),
        # He et al. (2016), table 6: 0.27 M and 0.46 M.
        ("resnet20", 3, 32, 269_722),
        ("resnet32", 3, 32, 464_154),
        # Zagoruyko & Komodakis (2016), table 4: 11.0 M and 36.5 M.
        ("wrn16_8", 3, 32, 10_961_370),
        ("wrn28_10", 3, 32, 36_479_194),
        # Torchvision's 20,035,136 of features, and the classifier.
        ("vgg19_cifar", 3, 32, 20_040_522),
        # Torchvision's 11,689,512 and 25,557,032, less the larger stem and 990 of 1000 classes.
        ("resnet18_cifar", 3, 32, 11_689_512 - 64 * 3 * (49 - 9) - 990 * 513),
        ("resnet50_cifar", 3, 32, 25_557_032 - 64 * 3 * (49 - 9) - 990 * 2049),
        ("resnet18_cifar", 1, 28, 11_689_512 - 64 * (3 * 49 - 9) - 990 * 513),
        ("resnet18", 3, 64, 11_689_512 - 990 * 513),
    ],
)
def test_shapes_and_sizes(name: str, in_channels: int, size: int, expected: int) -> None:
    with torch.device("meta"):  # shapes only: nothing is drawn and nothing computed
        model = create_model(name, num_classes=10, in_channels=in_channels)
        logits = model(torch.empty(2, in_channels, size, size))
    assert parameters(model) == expected
    assert logits.shape == (2, 10)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_depth_is_the_number_of_weighted_layers() -> None:
    for name, depth in (("resnet_tiny", 8), ("resnet20", 20), ("resnet32", 32)):
        layers = create_model(name, num_classes=10).modules()
        assert sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in layers) == depth


@pytest.mark.parametrize(("name", "side"), [("resnet20", 8), ("resnet18_cifar", 4)])
def test_resolution_of_the_last_stage(name: str, side: int) -> None:
    model = create_model(name, num_classes=10).eval()
    sides = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, __, output: sides.append(output.shape[-1]))
    model(torch.zeros(1, 3, 32, 32))
    assert sides[0] == 32
    assert sides[-1] == side


def test_shortcut_is_the_identity_with_zeros_for_new_channels() -> None:
    # With its last normalisation scaled to zero a block is its shortcut.
    model = create_model("resnet_tiny", num_classes=10, in_channels=1).eval()
    block = model.get_submodule("blocks.1")
    nn.init.zeros_(block.get_parameter("bn2.weight"))
    images = torch.rand(2, 16, 8, 8)
    output = block(images)
    assert torch.equal(output[:, :16], images[:, :, ::2, ::2])
    assert torch.equal(output[:, 16:], torch.zeros(2, 16, 4, 4))


def test_weights_follow_the_global_seed() -> None:
    torch.manual_seed(3)
    first = create_model("resnet_tiny", num_classes=10).state_dict()
    torch.manual_seed(3)
    second = create_model("resnet_tiny", num_classes=10).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    third = create_model("resnet_tiny", num_classes=10).state_dict()
    assert not torch.equal(first["conv1.weight"], third["conv1.weight"])


@pytest.mark.parametrize(
    ("name", "layer"), [("resnet_tiny", "blocks.2.conv2"), ("resnet18_cifar", "conv1")]
)
def test_convolutions_start_with_he_initialisation(name: str, layer: str) -> None:
    torch.manual_seed(0)
    weight = create_model(name, num_classes=10).get_parameter(f"{layer}.weight")
    fan_out = weight.shape[0] * 9
    assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


@pytest.mark.filterwarnings("error")
def test_googlenet_returns_plain_logits_in_training() -> None:
    with torch.device("meta"):
        model = create_model("googlenet", num_classes=4)
        logits = model(torch.empty(2, 3, 64, 64))
    assert logits.shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("resnet_tinny", {}, "got 'resnet_tinny'; close matches: resnet_tiny"),
        ("resnet19", {}, "close matches: .*resnet18"),
        ("fcn_resnet50", {}, "expected one of our models or of torchvision's classifiers"),
        ("qqqq", {}, "got 'qqqq'; ours: lenet_300_100, resnet_tiny"),
        (
            "resnet18",
            {"in_channels": 1},
            "in_channels: expected 3 .*'resnet18', got 1.*resnet_tiny",
        ),
        (
            "resnet_tiny",
            {"in_channels": 0},
            "in_channels: expected an integer of at least 1, got 0",
        ),
        ("resnet_tiny", {"num_classes": 0}, "num_classes: expected .* at least 1, got 0"),
    ],
)
def test_refused(name: str, options: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        create_model(name, **{"num_classes": 10, **options})


def test_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    create_model("resnet_tiny", num_classes=10)
    with pytest.raises(ImportError, match=r"'resnet18' .* torchvision, .* \[train\] extra"):
        create_model("resnet18", num_classes=10)


def test_timm_models_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Timm:
        def list_models(self) -> list[str]:
            return ["resnet26d", "resnet50d"]

        def create_model(self, name: str, *, num_classes: int, in_chans: int) -> nn.Module:
            assert name == "resnet26d"
            return nn.Linear(in_chans, num_classes)

    monkeypatch.setitem(sys.modules, "timm", Timm())  # type: ignore[arg-type]
    model = create_model("timm/resnet26d", num_classes=7, in_channels=2)
    assert model.weight.shape == (7, 2)
    with pytest.raises(ValueError, match="got 'resnet26'; close matches: resnet26d"):
        create_model("timm/resnet26", num_classes=7)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="model: 'timm/resnet26d' is timm's, which cannot be"):
        create_model("timm/resnet26d", num_classes=7)
