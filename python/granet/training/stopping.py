"""Stopping a run in good order: Ctrl-C and SIGTERM are noted, and obeyed after the step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Stopped(Exception):
    """A run ended early, on request, and `checkpoint` continues it."""

    def __init__(self, checkpoint: Path, step: int, signal_number: int | None) -> None:
        super().__init__(f"stopped at step {step}; continue with --resume {checkpoint}")
        self.checkpoint = checkpoint
        """Where training resumes."""
        self.signal_number = signal_number
        """SIGINT or SIGTERM; None where the caller had limited the steps."""


class StopSignals:
    """Notes SIGINT and SIGTERM while it listens; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        """The first signal that came."""

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Handle both signals inside `with`; the previous handlers return afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
