"""What the program says of bad input."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def user_errors(command: str) -> Iterator[None]:
    """Bad input, or a library that is missing, becomes one line on stderr, and exit status 2."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
    except ImportError as error:
        message = str(error)
        if "install" not in message:
            message += "; pip install --no-build-isolation '.[train]' brings what is missing"
    else:
        return
    rank = os.environ.get("RANK", "0")  # of torchrun's processes, which mostly say the same
    where = "" if rank == "0" else f" (process {rank})"
    print(f"granet {command}: error{where}: {message}", file=sys.stderr)
    raise SystemExit(2)
