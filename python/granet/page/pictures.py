"""Mask pictures as images within the page: a PNG of few bytes each, sixteen colours."""

from __future__ import annotations

import base64
import io

import torch
from PIL import Image

from granet.page.network import BETWEEN, LEVELS, MaskPicture

POSITIVE, NEGATIVE, LINE = (47, 134, 214), (224, 118, 26), (128, 128, 128)
"""Seen on a light page and on a dark one; the background shows where a weight is inactive."""
FAINTEST, LINE_OPACITY = 70, 40
"""Opacity of the smallest active weight and of lines between kernels, of 255."""


def data_uri(picture: MaskPicture) -> str:
    """A picture, a pixel a weight."""
    levels = picture.levels
    colours = torch.where(levels < 0, LEVELS - levels, levels)
    colours = torch.where(levels == BETWEEN, 2 * LEVELS + 1, colours).to(torch.uint8)
    height, width = colours.shape
    image = Image.frombytes("P", (width, height), colours.numpy().tobytes())
    shades = [FAINTEST + (255 - FAINTEST) * level // (LEVELS - 1) for level in range(LEVELS)]
    image.putpalette(bytes((0, 0, 0, *POSITIVE * LEVELS, *NEGATIVE * LEVELS, *LINE)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", bits=4, transparency=bytes((0, *shades, *shades, LINE_OPACITY)))
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
