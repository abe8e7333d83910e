"""Pixels to network input: subtract the channel's mean, divide by its standard deviation."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Channel statistics of ImageNet's training images on the scale 0..1, as used by torchvision's
# pretrained models.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and population standard deviation of each channel of uint8 images (N, C, H, W).

    Both are exact and in pixel values. On the scale 0..1 the published training sets have
    Fashion-MNIST: mean .2860, std .3530;
    CIFAR-10: mean .4914 .4822 .4465, std .2470 .2435 .2616;
    CIFAR-100: mean .507 .487 .441, std .267 .256 .276.
    """
    values = torch.arange(256, dtype=torch.float64)
    means, deviations = [], []
    for channel in images.unbind(1):
        # Counting the 256 values is exact, and needs no floating-point copy of the images.
        counts = torch.bincount(channel.flatten(), minlength=256).to(torch.float64)
        mean = (counts @ values / counts.sum()).item()
        variance = (counts @ (values - mean).square() / counts.sum()).item()
        means.append(mean)
        deviations.append(variance**0.5)
    return means, deviations


class Normalise:
    """uint8 images (N, C, H, W) to float32, given each channel's statistics in pixel values."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        # A channel that never varies carries no information; dividing by 1 keeps it 0 and not NaN.
        std = [deviation if deviation > 0 else 1.0 for deviation in std]
        self._mean = torch.tensor(mean, dtype=torch.float32, device=device)[:, None, None]
        self._std = torch.tensor(std, dtype=torch.float32, device=device)[:, None, None]

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().sub_(self._mean).div_(self._std)
