"""What a proof found: figures, and the limits that they must keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Figures = Mapping[str, float]

MOST_REMARKS = 10


@dataclass(frozen=True)
class Result:
    """The figures of one proof. It has passed where every figure keeps its limit."""

    goal: str
    length: str  # in words: how much was done
    figures: Figures
    at_most: Figures = field(default_factory=dict)
    at_least: Figures = field(default_factory=dict)
    remarks: Sequence[str] = ()  # what went wrong, in words; the first of them
    failed_tests: Sequence[str] = ()  # by name, where the proof is a run of tests

    @property
    def missed(self) -> list[str]:
        """The limits that are not kept."""
        figures = self.figures
        above = [
            f"{name} is {figures[name]}, at most {self.at_most[name]} allowed"
            for name in self._above
        ]
        below = [
            f"{name} is {figures[name]}, at least {self.at_least[name]} wanted"
            for name in self._below
        ]
        return above + below

    @property
    def _above(self) -> list[str]:
        return [name for name, limit in self.at_most.items() if not self.figures[name] <= limit]

    @property
    def _below(self) -> list[str]:
        return [name for name, limit in self.at_least.items() if not self.figures[name] >= limit]

    def finds(self, what: Sequence[str]) -> bool:
        """Whether each of these is a figure that misses its limit, or a test that has failed."""
        return bool(what) and set(what) <= {*self._above, *self._below, *self.failed_tests}

    @property
    def passed(self) -> bool:
        """Whether every limit is kept."""
        return not self.missed

    def entry(self) -> dict[str, Any]:
        """The result as JSON."""
        limit = {name: f"<= {value}" for name, value in self.at_most.items()}
        limit |= {name: f">= {value}" for name, value in self.at_least.items()}
        return {
            "goal": self.goal,
            "length": self.length,
            "figure": dict(self.figures),
            "limit": limit,
            "passed": self.passed,
            **({"missed": self.missed} if self.missed else {}),
            **({"remarks": list(self.remarks[:MOST_REMARKS])} if self.remarks else {}),
        }
