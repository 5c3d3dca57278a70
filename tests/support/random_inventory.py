"""Types of the fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Callable

MakeRouter = Callable[..., bytes]
"""`make_router(seed)`: the bytes of a random router's file."""
