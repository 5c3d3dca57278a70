"""Adapters whose operator needs something ready of each task: made when it is new, and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from polyrex.kernels.routing import StepRouting
from polyrex.kernels.step_plan import Plan


class State(Protocol):
    """What an operator needs of D tasks for one module."""

    operator: ClassVar[str]
    """Which one, of torch.ops.polyrex: `(y, x, states, parts, places)`, adding to y in place.

    `states` holds a row for each task, `parts`, int64 [M, 3 + sizes], where a module's state begins
    in it, where its outputs begin and how many they are, and then its sizes; `places` [T] the row
    of each token's task, -1 for none.
    """

    @property
    def sizes(self) -> tuple[int, ...]:
        """What the operator has to know of the module's shape."""

    def packed(self, dtype: torch.dtype) -> Tensor:
        """[D, size]: a task's values as the operator reads them."""


S = TypeVar("S", bound=State, covariant=True)


@dataclass(frozen=True)
class OwnStateModule(Generic[S]):
    """A whole target module: where its outputs lie in the layer's, and how its state is made.

    `derive` takes rows of its routing weights, [D, W] float32.
    """

    index: int
    width: int  # W
    d_out: int
    column: int
    derive: Callable[[Tensor], S]


class OwnStateLayer:
    """`y_t += x_t W_t` for every module of a layer, with W_t of each token's task, never built."""

    def __init__(self, modules: Sequence[OwnStateModule[State]], dtype: torch.dtype) -> None:
        """`dtype` is that of inputs and outputs: float32 or bfloat16."""
        self._modules, self._dtype = modules, dtype
        parts: list[tuple[int, ...]] = []
        size = 0
        for module in modules:
            empty = module.derive(torch.zeros(1, module.width))
            parts.append((size, module.column, module.d_out, *empty.sizes))
            size += empty.packed(dtype).shape[1]
        self._parts = torch.tensor(parts)
        self._add_ = getattr(torch.ops.polyrex, empty.operator).default
        self._states = torch.zeros(0, size, dtype=dtype)
        self._keys: dict[int, object] = {}  # whose state a place holds
        self._ready: Plan | None = None

    @property
    def state_bytes(self) -> int:
        """What the state of one task takes."""
        return self._states.itemsize * self._states.shape[1]

    def add_(self, y: Tensor, x: Tensor, step: StepRouting) -> None:
        """Add the adapters' part for x [T, d_in] to y [T, d], in place."""
        # Without states every token would silently get the base model's answer.
        assert step.plan.entries or not len(step.rows), "the plan names no task's state"
        if step.plan is not self._ready:
            self._make(step)
        self._add_(y, x, self._states, self._parts, step.places)

    def _make(self, step: StepRouting) -> None:
        """Make what is new, all at once."""
        fresh = [
            (row, entry.place, entry.key)
            for row, entry in step.plan.entries
            if self._keys.get(entry.place) is not entry.key
        ]
        if fresh:
            rows, places, keys = zip(*fresh, strict=True)
            self._enlarge(max(places) + 1)
            weights = step.weights[list(rows)]
            made = [m.derive(weights[:, m.index]).packed(self._dtype) for m in self._modules]
            self._states[list(places)] = torch.cat(made, 1)
            self._keys.update(zip(places, keys, strict=True))
        self._ready = step.plan

    def _enlarge(self, places: int) -> None:
        if places > len(self._states):
            larger = self._states.new_zeros(2 * places, self._states.shape[1])
            larger[: len(self._states)] = self._states
            self._states = larger


def in_twos(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """[D, n, c] with an even n -> [D, n * c] in `dtype`, of two bytes with its rows in twos."""
    rows = matrix.reshape(len(matrix), -1, 4 // dtype.itemsize, matrix.shape[2])
    return rows.transpose(2, 3).flatten(1).to(dtype)
