"""The layers that are measured: those of ResNets, at the sizes SparseProp's figures are known for."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class ConvShape:
    """Square images, square kernel, padding that keeps the size at stride 1."""

    channels_in: int
    channels_out: int
    side: int
    kernel: int
    stride: int
    batch: int

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def weight(self) -> tuple[int, int, int, int]:
        return (self.channels_out, self.channels_in, self.kernel, self.kernel)

    @property
    def input(self) -> tuple[int, int, int, int]:
        return (self.batch, self.channels_in, self.side, self.side)

    def __str__(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        size = f"{self.channels_in}>{self.channels_out} {self.kernel}x{self.kernel}{stride}"
        return f"{size} at {self.side}x{self.side}, batch {self.batch}"


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A matrix and the rows it multiplies."""

    features_in: int
    features_out: int
    batch: int

    @property
    def weight(self) -> tuple[int, int]:
        return (self.features_out, self.features_in)

    @property
    def input(self) -> tuple[int, int]:
        return (self.batch, self.features_in)

    def __str__(self) -> str:
        return f"{self.features_in}>{self.features_out}, batch {self.batch}"


# channels in, channels out, side, kernel, stride: ResNet-50 on 224x224 images
_IMAGENET = (
    (64, 64, 56, 3, 1),
    (128, 128, 28, 3, 1),
    (256, 256, 14, 3, 1),
    (512, 512, 7, 3, 1),
    (64, 256, 56, 1, 1),
    (256, 64, 56, 1, 1),
    (512, 128, 28, 1, 1),
    (1024, 256, 14, 1, 1),
    (2048, 512, 7, 1, 1),
    (64, 128, 56, 3, 2),
)
# ResNet-18 on 32x32 images
_CIFAR = ((64, 64, 32, 3, 1), (128, 128, 16, 3, 1), (256, 256, 8, 3, 1), (512, 512, 4, 3, 1))

CONVOLUTIONS = (
    *(ConvShape(*size, batch) for batch in (8, 32) for size in _IMAGENET),
    *(ConvShape(*size, 128) for size in _CIFAR),
)
BATCH_1 = tuple(dict.fromkeys(replace(shape, batch=1) for shape in CONVOLUTIONS))

LINEARS = tuple(
    LinearShape(features_in, features_out, batch)
    for features_in, features_out in ((2048, 1000), (768, 3072), (3072, 768), (4096, 4096))
    for batch in (32, 256)
)

QUICK_CONVOLUTIONS = tuple(CONVOLUTIONS[i] for i in (2, 5, 9))
QUICK_BATCH_1 = (BATCH_1[2],)
QUICK_LINEARS = (LINEARS[0],)
