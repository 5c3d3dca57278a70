"""Tells the operator how far a starting server is."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

logger = logging.getLogger(__name__)


class Progress:
    """Names each stage while it runs, then how long it took, on standard error."""

    def __init__(self, *, in_log: bool = False) -> None:
        """With `in_log`, it says so in lines of the log, which a collector can read."""
        self._console = None if in_log else Console(stderr=True, highlight=False, soft_wrap=True)
        self._start = time.monotonic()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Run one stage of the start."""
        start = time.monotonic()
        if self._console is None:
            yield
            seconds = round(time.monotonic() - start, 1)
            logger.info("%s", name, extra={"fields": {"seconds": seconds}})
            return
        with self._console.status(name):
            yield
        self._console.print(f"[dim]{time.monotonic() - start:6.1f} s[/dim]  {name}", markup=True)

    def say(self, text: str) -> None:
        """Print one line."""
        if self._console is None:
            logger.info("%s", text)
        else:
            self._console.print(f"          {text}", markup=False)

    def elapsed(self) -> float:
        """The seconds since the start."""
        return time.monotonic() - self._start
