"""An image file, decoded."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


def read_image(path: str | Path) -> "Image.Image":
    """In RGB.

    Raises:
        ValueError: the file (named) is no image.
        ImportError: Pillow is missing.
    """
    from PIL import Image  # other data sets are read without it

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: expected a readable image: {error}") from error
