"""Finding a data set's files, and checks that the readers share."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def locate_files(data_dir: Path, layouts: Sequence[Sequence[str]]) -> list[Path]:
    """Paths of the first layout whose files all exist.

    Args:
        data_dir: where to look.
        layouts: alternatives; each is the relative names of all files that belong together.

    Raises:
        FileNotFoundError: no layout is complete; lists every file looked for and whether it was
            there.
    """
    candidates = [[data_dir / name for name in layout] for layout in layouts]
    for paths in candidates:
        if all(path.is_file() for path in paths):
            return paths
    problem = "holds no complete set of files" if data_dir.is_dir() else "is not a directory"
    lines = [f"data_dir: {data_dir} {problem}; looked for"]
    for number, paths in enumerate(candidates):
        if number:
            lines.append("or")
        lines += [f"  {'found  ' if path.is_file() else 'missing'} {path}" for path in paths]
    raise FileNotFoundError("\n".join(lines))


def check_labels(path: Path, labels: Tensor, num_images: int, num_classes: int) -> None:
    """Refuse labels (int64, 1-D) that are not one class in [0, num_classes) for each of at least
    one image."""
    if len(labels) != num_images or num_images == 0:
        raise ValueError(
            f"{path}: expected a label for each of at least one image, "
            f"got {len(labels)} labels for {num_images} images"
        )
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise ValueError(
            f"{path}: expected labels in [0, {num_classes}), got {torch.unique(outside).tolist()}"
        )
