"""Adapters whose matrix is a sum of Kronecker products, a task's own, on the compiled operator.

The operator, `torch.ops.polyrex.kronecker_add_` (source: kronecker.cpp), takes every task's factors
as one row: for each module first [p' * E, p], with the terms e fastest, then second [E * q, q']; p'
* E and q' are rounded up to 16, p to 32, the rows of second to 2 a term and to 32 for all. They are
in the dtype of x and y; in bfloat16 the rows of second lie in twos, [E * q / 2, q', 2]. `parts`,
int64 [M, 8], says where a module's factors begin, where its outputs begin and how many they are,
and E, p, p', q, q'. The operator computes, for each token and module, `Y = sum_e first_e^T X
second_e` with X = x in rows of q, and adds Y, row after row, to y.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .rank_space_layer import LANES
from .routing import StepRouting
from .task_states import TaskStates, in_twos


@dataclass(frozen=True)
class KroneckerFactors:
    """`W_t = sum_e first_e (x) second_e` of D tasks: first [D, E, p, p'], second [D, E, q, q']."""

    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class KroneckerModule:
    """A whole target module: where its outputs lie in the layer's, and how its factors are made.

    `derive` takes rows of its routing weights, [D, W] float32.
    """

    index: int
    width: int  # W
    d_out: int
    column: int
    derive: Callable[[Tensor], KroneckerFactors]


class KroneckerLayer:
    """`y_t += x_t W_t` for every module of a layer, with W_t of each token's task, never built."""

    def __init__(self, modules: Sequence[KroneckerModule], dtype: torch.dtype) -> None:
        """`dtype` is that of inputs and outputs: float32 or bfloat16."""
        self._modules, self._dtype = modules, dtype
        parts: list[tuple[int, ...]] = []
        start = 0
        for module in modules:
            empty = module.derive(torch.zeros(1, module.width))
            sizes = (*empty.first.shape[1:], *empty.second.shape[2:])  # E, p, p', q, q'
            parts.append((start, module.column, module.d_out, *sizes))
            start += _state(empty, dtype).shape[1]
        self._parts = torch.tensor(parts)
        self._states = TaskStates(self._derive, start, dtype)
        self._add_ = torch.ops.polyrex.kronecker_add_.default

    @property
    def state_bytes(self) -> int:
        """What the factors of one task take."""
        return self._states.bytes_per_task

    def add_(self, y: Tensor, x: Tensor, step: StepRouting) -> None:
        """Add the adapters' part for x [T, d_in] to y [T, d], in place."""
        self._add_(y, x, self._states.of(step), self._parts, step.places)

    def _derive(self, weights: Tensor) -> Tensor:
        factors = (module.derive(weights[:, module.index]) for module in self._modules)
        return torch.cat([_state(each, self._dtype) for each in factors], 1)


def _state(factors: KroneckerFactors, dtype: torch.dtype) -> Tensor:
    """[D, size]: the operator's layout."""
    first = factors.first.permute(0, 3, 1, 2).flatten(1, 2)  # [D, p' * E, p]
    first = F.pad(first, (0, -first.shape[2] % 32, 0, -first.shape[1] % LANES))
    second = F.pad(factors.second, (0, 0, 0, factors.second.shape[2] % 2)).flatten(1, 2)
    second = F.pad(second, (0, -second.shape[2] % LANES, 0, -second.shape[1] % 32))
    return torch.cat([first.flatten(1).to(dtype), in_twos(second, dtype)], 1)
