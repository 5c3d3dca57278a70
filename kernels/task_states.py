"""What a layer makes of each task once and keeps, for methods whose operators need it ready."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .plan import Plan
from .routing import StepRouting


class TaskStates:
    """A row of values for every place of the plan, made when a task is new to its place."""

    def __init__(self, derive: Callable[[Tensor], Tensor], size: int, dtype: torch.dtype) -> None:
        """`derive` makes rows of values [D, size] from routing weights [D, M, W] float32."""
        self._derive = derive
        self._values = torch.zeros(0, size, dtype=dtype)
        self._keys: dict[int, object] = {}
        self._ready: Plan | None = None

    @property
    def bytes_per_task(self) -> int:
        """What the values of one task take."""
        return self._values.itemsize * self._values.shape[1]

    def of(self, step: StepRouting) -> Tensor:
        """[places, size]: row `step.places[t]` is that of token t's task."""
        # Without states every token would silently get the base model's answer.
        assert step.plan.entries or not len(step.rows), "the plan names no task's state"
        if step.plan is not self._ready:
            self._make(step)
        return self._values

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
            self._values[list(places)] = self._derive(step.weights[list(rows)])
            self._keys.update(zip(places, keys, strict=True))
        self._ready = step.plan

    def _enlarge(self, places: int) -> None:
        if places > len(self._values):
            larger = self._values.new_zeros(2 * places, self._values.shape[1])
            larger[: len(self._values)] = self._values
            self._values = larger


def in_twos(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """[D, n, c] with an even n -> [D, n * c] in `dtype`, of two bytes with its rows in twos."""
    rows = matrix.reshape(len(matrix), -1, 4 // dtype.itemsize, matrix.shape[2])
    return rows.transpose(2, 3).flatten(1).to(dtype)
