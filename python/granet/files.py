"""Files that are there whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of ``path`` when the block ends.

    After a crash or a power cut there is the old file or the new one. A process that is killed
    meanwhile leaves ``tmp-NAME`` behind, which the next one to write the file overwrites: one writes
    it at a time.
    """
    temporary = path.with_name(f"tmp-{path.name}")  # torch.export.save looks at the suffix
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)  # or a power cut might undo the renaming


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
