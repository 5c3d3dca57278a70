"""Waiting for what happens a moment after an answer."""

from __future__ import annotations

import time
from collections.abc import Callable


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds, for ten seconds at least."""
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("the condition never held")
