"""Settings by name: data sets with their networks, and methods, to be put together.

`granet train -c cifar10-vgg19 -c granet sparsity=0.95` takes two of them and a value. Each is a YAML
file beside this module whose first line says what it is.
"""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path


def names() -> dict[str, str]:
    """Recipe -> its first line."""
    files = sorted(resources.files(__name__).iterdir(), key=lambda file: file.name)
    return {
        file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8")
        .splitlines()[0]
        .lstrip("# ")
        for file in files
        if file.name.endswith(".yaml")
    }


def read(name: str) -> dict[str, object]:
    """Settings in a YAML file, or those of a recipe.

    Raises:
        FileNotFoundError: there is neither; the message has the closest names.
        ValueError: it does not hold settings.
    """
    from granet.training.config import (
        read_config_file,  # needs the train extra, which the list does not
    )

    if not Path(name).is_file() and name in names():
        with resources.as_file(resources.files(__name__) / f"{name}.yaml") as path:
            return read_config_file(path)
    if not Path(name).is_file():
        close = difflib.get_close_matches(name, names(), n=3) or sorted(names())
        raise FileNotFoundError(
            f"config: expected a YAML file or a recipe, found none at {name}; recipes: {', '.join(close)}"
        )
    return read_config_file(Path(name))
