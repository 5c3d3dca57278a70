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

    @property
    def missed(self) -> list[str]:
        """The limits that are not kept."""
        above = [
            f"{name} is {self.figures[name]}, at most {limit} allowed"
            for name, limit in self.at_most.items()
            if not self.figures[name] <= limit
        ]
        below = [
            f"{name} is {self.figures[name]}, at least {limit} wanted"
            for name, limit in self.at_least.items()
            if not self.figures[name] >= limit
        ]
        return above + below

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
