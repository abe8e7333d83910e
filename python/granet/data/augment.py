"""Random shift and flip of a whole batch at once, on the device that holds it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """Random translation and mirroring, each image on its own."""

    shift: int = 0
    """Largest translation in pixels along each axis. Zeros come in at the border, as in padding by
    `shift` and cropping back to the original size."""

    flip: bool = False
    """Mirror left and right with probability 1/2."""

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Random moves for `count` images, for `apply`.

        Returns:
            int64 (count, 3): row and column offset, both in [0, 2 * shift], and mirrored (0 or 1).
        """
        offsets = torch.randint(0, 2 * self.shift + 1, (count, 2), generator=generator)
        mirrored = torch.randint(0, 2 if self.flip else 1, (count, 1), generator=generator)
        return torch.cat([offsets, mirrored], dim=1)

    def apply(self, images: Tensor, moves: Tensor) -> Tensor:
        """Move images (N, C, H, W) of any dtype by `moves` (N, 3) from `draw`, on the same device.

        Returns:
            A tensor like `images`; `images` itself where there is nothing to do.
        """
        if self.shift == 0 and not self.flip:
            return images
        count, channels, height, width = images.shape
        padded = pad(images, [self.shift] * 4)
        device = images.device
        rows = torch.arange(height, device=device) + moves[:, 0, None]
        columns = torch.arange(width, device=device)
        columns = torch.where(moves[:, 2, None] == 1, columns.flip(0), columns)
        columns = columns + moves[:, 1, None]
        sample = torch.arange(count, device=device)[:, None, None, None]
        channel = torch.arange(channels, device=device)[:, None, None]
        return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]
