"""Adapters whose matrix is a sum of Kronecker products, a task's own.

The compiled operator, `torch.ops.polyrex.kronecker_add_` (contract: own_state_layer.py; source:
kronecker.cpp), computes for each token and module `Y = sum_e first_e^T X second_e` with X = x in
rows of q, and adds Y, row after row, to y. A task's state is first [p' * E, p], with the terms e
fastest, then second [E * q, q']; p' * E and q' are rounded up to 16, p to 32, the rows of second to
2 a term and to 32 for all. They are in the dtype of x and y; in bfloat16 the rows of second lie in
twos, [E * q / 2, q', 2].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from polyrex.kernels.cpu.rank_space import LANES
from polyrex.kernels.cpu.task_state import in_twos


@dataclass(frozen=True)
class KroneckerFactors:
    """`W_t = sum_e first_e (x) second_e` of D tasks: first [D, E, p, p'], second [D, E, q, q']."""

    first: Tensor
    second: Tensor
    operator: ClassVar[str] = "kronecker_add_"

    @property
    def sizes(self) -> tuple[int, ...]:
        """E, p, p', q, q'."""
        return *self.first.shape[1:], *self.second.shape[2:]

    def packed(self, dtype: torch.dtype) -> Tensor:
        """[D, size]: the operator's layout."""
        first = self.first.permute(0, 3, 1, 2).flatten(1, 2)  # [D, p' * E, p]
        first = F.pad(first, (0, -first.shape[2] % 32, 0, -first.shape[1] % LANES))
        second = F.pad(self.second, (0, 0, 0, self.second.shape[2] % 2)).flatten(1, 2)
        second = F.pad(second, (0, -second.shape[2] % LANES, 0, -second.shape[1] % 32))
        return torch.cat([first.flatten(1).to(dtype), in_twos(second, dtype)], 1)
