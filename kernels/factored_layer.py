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

from .plan import Plan
from .routing import StepRouting

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
        self._states = torch.zeros(0, start, dtype=dtype)
        self._keys: dict[int, object] = {}
        self._ready: Plan | None = None
        self._add_ = torch.ops.polyrex.factored_add_.default

    @property
    def state_bytes(self) -> int:
        """What the leaves of one task take."""
        return self._states.itemsize * self._states.shape[1]

    def add_(self, y: Tensor, x: Tensor, step: StepRouting) -> None:
        """Add the adapters' part for x [T, d_in] to y [T, d], in place."""
        # Without states every token would silently get the base model's answer.
        assert step.plan.entries or not len(x), "the plan names no task's state"
        if step.plan is not self._ready:
            self._derive(step)
        self._add_(y, x, self._states, self._parts, step.places)

    def _derive(self, step: StepRouting) -> None:
        """Make the leaves of tasks that are new to this layer, all at once."""
        fresh = [
            (row, entry.place, entry.key)
            for row, entry in step.plan.entries
            if self._keys.get(entry.place) is not entry.key
        ]
        if fresh:
            rows, places, keys = zip(*fresh, strict=True)
            weights = step.weights[list(rows)]
            sides = (module.derive(weights[:, module.index]) for module in self._modules)
            self._states = _enlarged(self._states, max(places) + 1)
            self._states[list(places)] = torch.cat([_state(side, self._dtype) for side in sides], 1)
            self._keys.update(zip(places, keys, strict=True))
        self._ready = step.plan


def _enlarged(states: Tensor, places: int) -> Tensor:
    if places <= len(states):
        return states
    larger = states.new_zeros(2 * places, states.shape[1])
    larger[: len(states)] = states
    return larger


def _state(sides: FactoredSides, dtype: torch.dtype) -> Tensor:
    """[D, size]: the operator's layout."""
    tasks, rank, _ = sides.a_first.shape
    together = 4 // dtype.itemsize

    def columns(leaves: Tensor) -> Tensor:  # [D, r, n] -> [D, n, 16]
        return F.pad(leaves, (0, 0, 0, RANK - rank)).transpose(1, 2)

    def in_twos(matrix: Tensor) -> Tensor:  # [D, n, c] -> [D, n * c]
        whole = F.pad(matrix, (0, 0, 0, -matrix.shape[1] % RANK))
        rows = whole.view(tasks, -1, together, whole.shape[2])
        return rows.transpose(2, 3).flatten(1).to(dtype)

    def shifts(shift: Tensor | None) -> Tensor:  # [D, 16] float32, as it lies in memory
        whole = torch.zeros(tasks, RANK)
        if shift is not None:
            whole[:, :rank] = shift
        return whole.view(dtype)

    widened = F.pad(sides.b_second, (0, -sides.b_second.shape[2] % RANK, 0, RANK - rank))
    parts = [columns(sides.a_first).flatten(1).to(dtype), in_twos(columns(sides.a_second))]
    parts += [shifts(sides.a_shift), columns(sides.b_first).flatten(1).to(dtype)]
    parts += [in_twos(widened), shifts(sides.b_shift)]
    return torch.cat(parts, 1).contiguous()
