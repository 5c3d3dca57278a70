"""Tells the operator how far a starting server is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


class Progress:
    """Names each stage while it runs, then how long it took, on standard error."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._start = time.monotonic()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Run one stage of the start."""
        start = time.monotonic()
        with self._console.status(name):
            yield
        self._console.print(f"[dim]{time.monotonic() - start:6.1f} s[/dim]  {name}", markup=True)

    def say(self, text: str) -> None:
        """Print one line."""
        self._console.print(f"          {text}", markup=False)

    def elapsed(self) -> float:
        """The seconds since the start."""
        return time.monotonic() - self._start
