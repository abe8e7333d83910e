"""Networks by name: those of small images, and torchvision's and timm's classifiers."""

import difflib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import ModuleType

from torch import Tensor, nn
from torch.nn.functional import pad

__all__ = ["CifarResNet", "create_model"]


class CifarResNet(nn.Module):
    """The residual network for small images of He et al. (2016), section 4.2: a 3x3 stem, three
    stages whose widths double while the resolution halves, shortcuts without parameters, mean over
    the image, one linear layer.

    Input float (N, in_channels, H, W), H and W at least 4; output logits (N, num_classes).

    Args:
        blocks: residual blocks (of two convolutions) in each stage.
        num_classes: number of logits.
        in_channels: channels of the image.
        width: channels of the stem and the first stage.
        stride: of the stem; 2 leaves all stages a quarter of the work.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        *,
        num_classes: int,
        in_channels: int,
        width: int = 16,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        stages: list[nn.Module] = []
        channels = width
        for number, count in enumerate(blocks):
            out_channels = width << number
            for block in range(count):
                stride = 2 if number > 0 and block == 0 else 1
                stages.append(_BasicBlock(channels, out_channels, stride))
                channels = out_channels
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(self.relu(self.bn1(self.conv1(images))))
        logits: Tensor = self.fc(features.mean(dim=(2, 3)))
        return logits


class _BasicBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self._stride = stride
        self._new_channels = out_channels - in_channels

    def forward(self, images: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(images)))))
        # Option A of the paper: every second pixel, and zeros for the channels that are new.
        shortcut = images[:, :, :: self._stride, :: self._stride]
        if self._new_channels:
            shortcut = pad(shortcut, (0, 0, 0, 0, 0, self._new_channels))
        output: Tensor = self.relu(residual + shortcut)
        return output


def _cifar_resnet(*blocks: int, stride: int = 1) -> Callable[[int, int], nn.Module]:
    return lambda num_classes, in_channels: CifarResNet(
        blocks, num_classes=num_classes, in_channels=in_channels, stride=stride
    )


class WideResNet(nn.Module):
    """The wide residual network of Zagoruyko & Komodakis (2016) for small images: three stages of
    pre-activated blocks, `factor` times as wide as :class:`CifarResNet`, without dropout.

    Input float (N, in_channels, H, W), H and W at least 4; output logits (N, num_classes).

    Args:
        depth: weighted layers but for shortcuts, 4 more than a multiple of 6.
        factor: of the width.
        num_classes: number of logits.
        in_channels: channels of the image.
    """

    def __init__(self, depth: int, factor: int, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        channels = 16
        for number in range(3):
            width = (16 << number) * factor
            for block in range((depth - 4) // 6):
                stride = 2 if number > 0 and block == 0 else 1
                blocks.append(_PreActivatedBlock(channels, width, stride))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        features = self.relu(self.bn(self.blocks(self.conv1(images))))
        logits: Tensor = self.fc(features.mean(dim=(2, 3)))
        return logits


class _PreActivatedBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module | None = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        activated = self.relu(self.bn1(images))
        shortcut = images if self.shortcut is None else self.shortcut(activated)
        output: Tensor = self.conv2(self.relu(self.bn2(self.conv1(activated)))) + shortcut
        return output


def _wide_resnet(depth: int, factor: int) -> Callable[[int, int], nn.Module]:
    return lambda num_classes, in_channels: WideResNet(
        depth, factor, num_classes=num_classes, in_channels=in_channels
    )


def _vgg19(num_classes: int, in_channels: int) -> nn.Module:
    """VGG-19 for small images, as the pruning papers have it: torchvision's convolutions with batch
    norm, the mean over what is left of the image, one linear layer.
    """
    features = _torchvision_model("vgg19_bn", 1).features
    assert isinstance(features, nn.Sequential)
    stem = nn.Conv2d(in_channels, 64, 3, padding=1)
    features[0] = stem
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return nn.Sequential(
        OrderedDict(
            features=features[:-1],  # the last pooling is the mean
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(512, num_classes),
        )
    )


def _small_image_stem(name: str) -> Callable[[int, int], nn.Module]:
    """torchvision's ResNet `name` with a 3x3 stem of stride 1 and no pooling after it."""

    def build(num_classes: int, in_channels: int) -> nn.Module:
        model = _torchvision_model(name, num_classes)
        stem = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        model.conv1 = stem
        model.maxpool = nn.Identity()
        return model

    return build


def _lenet(num_classes: int, in_channels: int) -> nn.Module:
    """LeNet-300-100 of LeCun et al. (1998), section III.C.2, with ReLUs: three linear layers, for
    images of 28x28, the network with which pruning papers begin.
    """
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(in_channels * 28 * 28, 300),
            relu1=nn.ReLU(),
            fc2=nn.Linear(300, 100),
            relu2=nn.ReLU(),
            fc3=nn.Linear(100, num_classes),
        )
    )


_MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "lenet_300_100": _lenet,
    "resnet_tiny": _cifar_resnet(1, 1, 1),
    "resnet_tiny_s2": _cifar_resnet(1, 1, 1, stride=2),
    "resnet20": _cifar_resnet(3, 3, 3),
    "resnet32": _cifar_resnet(5, 5, 5),
    "wrn16_8": _wide_resnet(16, 8),
    "wrn28_10": _wide_resnet(28, 10),
    "vgg19_cifar": _vgg19,
    "resnet18_cifar": _small_image_stem("resnet18"),
    "resnet50_cifar": _small_image_stem("resnet50"),
}

# These two return their auxiliary classifiers as well while training, unless told not to, and warn
# about the default of their initialisation.
_TORCHVISION_OPTIONS = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def create_model(name: str, *, num_classes: int, in_channels: int = 3) -> nn.Module:
    """A network with fresh weights, drawn from PyTorch's global generator.

    Args:
        name: "lenet_300_100" (for images of 28x28), "resnet_tiny" (three blocks, 75 thousand
            weights, for images of 8x8 and more), "resnet_tiny_s2" (the same, stem of stride 2),
            "resnet20", "resnet32" (He et al., 2016, for 32x32), "wrn16_8", "wrn28_10" (wide ones),
            "vgg19_cifar", "resnet18_cifar", "resnet50_cifar" (torchvision's for small images), a
            classifier of torchvision.models, or "timm/NAME".
        num_classes: number of logits, at least 1.
        in_channels: channels of the images, at least 1; torchvision's classifiers take 3 only.

    Raises:
        ValueError: unknown name (the message has the closest ones), or a number out of range.
        ImportError: the model is torchvision's or timm's, and that is not installed.
    """
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ValueError(f"{argument}: expected an integer of at least 1, got {value}")
    if name in _MODELS:
        return _MODELS[name](num_classes, in_channels)
    if name.startswith("timm/"):
        return _timm_model(name.removeprefix("timm/"), num_classes, in_channels)
    _check_torchvision_name(name)
    if in_channels != 3:
        raise ValueError(
            f"in_channels: expected 3 for torchvision's {name!r}, got {in_channels}; "
            f"models for any number of channels: {', '.join(_MODELS)}"
        )
    return _torchvision_model(name, num_classes)


def _check_torchvision_name(name: str) -> None:
    models = _import_models(name)
    # Only the classifiers: list_models() without a module adds detection, segmentation and video.
    known = [*_MODELS, *models.list_models(module=models)]
    if name in known:
        return
    close = difflib.get_close_matches(name, known, n=5)
    hint = f"close matches: {', '.join(close)}" if close else f"ours: {', '.join(_MODELS)}"
    raise ValueError(
        f"model: expected one of our models or of torchvision's classifiers, got {name!r}; {hint}"
    )


def _torchvision_model(name: str, num_classes: int) -> nn.Module:
    options = _TORCHVISION_OPTIONS.get(name, {})
    model: nn.Module = _import_models(name).get_model(
        name, weights=None, num_classes=num_classes, **options
    )
    return model


def _timm_model(name: str, num_classes: int, in_channels: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"model: 'timm/{name}' is timm's, which cannot be imported ({error}); pip install timm"
        ) from error
    if name not in timm.list_models():
        close = difflib.get_close_matches(name, timm.list_models(), n=5)
        raise ValueError(
            f"model: expected one of timm's models, got {name!r}; close matches: {', '.join(close)}"
        )
    model: nn.Module = timm.create_model(name, num_classes=num_classes, in_chans=in_channels)
    return model


def _import_models(name: str) -> ModuleType:
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError(
            f"model: {name!r} is none of {', '.join(_MODELS)}, and torchvision, which may know it, "
            f"cannot be imported ({error}); install the [train] extra"
        ) from error
    found: ModuleType = models
    return found
