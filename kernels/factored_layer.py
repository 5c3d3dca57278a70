"""Adapters whose sides are tensor products of a task's own leaves, on the compiled operator.

The operator, `torch.ops.polyrex.factored_add_` (source: factored.cpp), takes every task's leaves as
one row: for each module, for the A side first [p, 16], second [q, 16], shift [16], for the B side
first [p', 16], second [16, q'], shift [16]; the rows of A's second and the columns of B's are
rounded up to 16. They are in the dtype of x and y, but for the shifts, which are float32; in
bfloat16 the rows of each second lie in twos, [n / 2, ., 2]. `parts`, int64 [M, 7], says where a
module's leaves begin, where its outputs begin and how many they are, and p, q, p', q'. The operator
computes, for each token and module, `h_k = first_k^T X second_k - shift_k sum(X)` with X = x in
rows of q, and adds `sum_k h_k (first_k (x) second_k - shift_k)` to y. Neither A nor B exists at any
time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .routing import StepRouting
from .task_states import TaskStates, in_twos

RANK = 16
"""The most rank rows that the operator holds in a register."""


@dataclass(frozen=True)
class FactoredSides:
    """Both sides of D tasks' adapters, every scale folded in; shifts are None where there are none.

    a_first [D, r, p], a_second [D, r, q], a_shift [D, 1]; the same for b.
    """

    a_first: Tensor
    a_second: Tensor
    a_shift: Tensor | None
    b_first: Tensor
    b_second: Tensor
    b_shift: Tensor | None


@dataclass(frozen=True)
class FactoredModule:
    """A whole target module: where its outputs lie in the layer's, and how its leaves are made.

    `derive` takes rows of its routing weights, [D, W] float32.
    """

    index: int
    width: int  # W
    d_out: int
    column: int
    derive: Callable[[Tensor], FactoredSides]


class FactoredLayer:
    """`y_t += B_t A_t x_t` for every module of a layer, with the leaves of each token's task."""

    def __init__(self, modules: list[FactoredModule], dtype: torch.dtype) -> None:
        """`dtype` is that of inputs and outputs: float32 or bfloat16."""
        self._modules, self._dtype = modules, dtype
        parts: list[tuple[int, ...]] = []
        start = 0
        for module in modules:
            empty = module.derive(torch.zeros(1, module.width))
            sides = (empty.a_first, empty.a_second, empty.b_first, empty.b_second)
            sizes = (side.shape[-1] for side in sides)
            parts.append((start, module.column, module.d_out, *sizes))
            start += _state(empty, dtype).shape[1]
        self._parts = torch.tensor(parts)
        self._states = TaskStates(self._derive, start, dtype)
        self._add_ = torch.ops.polyrex.factored_add_.default

    @property
    def state_bytes(self) -> int:
        """What the leaves of one task take."""
        return self._states.bytes_per_task

    def add_(self, y: Tensor, x: Tensor, step: StepRouting) -> None:
        """Add the adapters' part for x [T, d_in] to y [T, d], in place."""
        self._add_(y, x, self._states.of(step), self._parts, step.places)

    def _derive(self, weights: Tensor) -> Tensor:
        sides = (module.derive(weights[:, module.index]) for module in self._modules)
        return torch.cat([_state(side, self._dtype) for side in sides], 1)


def _state(sides: FactoredSides, dtype: torch.dtype) -> Tensor:
    """[D, size]: the operator's layout."""
    tasks, rank, _ = sides.a_first.shape

    def columns(leaves: Tensor) -> Tensor:  # [D, r, n] -> [D, n, 16]
        return F.pad(leaves, (0, 0, 0, RANK - rank)).transpose(1, 2)

    def shifts(shift: Tensor | None) -> Tensor:  # [D, 16] float32, as it lies in memory
        whole = torch.zeros(tasks, RANK)
        if shift is not None:
            whole[:, :rank] = shift
        return whole.view(dtype)

    widened = F.pad(sides.b_second, (0, -sides.b_second.shape[2] % RANK, 0, RANK - rank))
    second = columns(sides.a_second)
    second = F.pad(second, (0, 0, 0, -second.shape[1] % RANK))
    parts = [columns(sides.a_first).flatten(1).to(dtype), in_twos(second, dtype)]
    parts += [shifts(sides.a_shift), columns(sides.b_first).flatten(1).to(dtype)]
    parts += [in_twos(widened, dtype), shifts(sides.b_shift)]
    return torch.cat(parts, 1).contiguous()
