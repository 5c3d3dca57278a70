"""Roles of a method's parameters in training, and the learning rate of each role."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["experts", "gates", "token_routers"]
"""The role of a parameter: latent experts, scalar gates, or routers by which tokens choose."""


@dataclass(frozen=True)
class LearningRates:
    """Peak learning rates by role. A step of AdamW moves every number by about its learning rate,
    and the roles live on different scales."""

    experts: float = 2e-3
    """Learning rate of the experts."""
    gates: float = 3e-4
    """Learning rate of scalar gates."""
    routing: float = 5e-2
    """Learning rate of the tasks' routing logits."""
    token_routers: float = 2e-3
    """Learning rate of the routers by which tokens choose."""

    def of(self, group: str) -> float:
        """The rate of a parameter group, by its name."""
        rate: float = getattr(self, group)
        return rate
