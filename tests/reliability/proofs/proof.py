"""One goal: what proves it, and the defect that must be found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reliability.ground import Ground
from reliability.result import Result

Prove = Callable[[Ground], Result]


@dataclass(frozen=True)
class Proof:
    """One goal: `full` must pass, and `planted`, which has the defect, must not.

    `finds`: the figures that must then miss their limits, or the tests that must fail.
    """

    full: Prove
    planted: Prove
    defect: str
    finds: Sequence[str]
