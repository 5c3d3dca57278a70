"""The result of one check of the installation."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How a part stands, for `polyrex serve` with the settings at hand."""

    ok = "ok"
    note = "note"
    """Works, but slower than it could, or is not needed with these settings."""
    missing = "missing"
    """`polyrex serve` will fail."""


@dataclass(frozen=True)
class Finding:
    """One part of an installation."""

    part: str
    status: Status
    found: str
    effect: str = ""
    """The part of polyrex that will run on it, and why."""
    advice: str = ""
    """Advice, where something is missing."""
