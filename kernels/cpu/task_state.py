"""Adapters whose operator reads a state of each task: derived once for a new task, and kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyrex.kernels.modules import TaskState, TaskStateModule
from polyrex.kernels.routing import StepRouting
from polyrex.kernels.step_plan import StepPlan


class TaskStateLayer:
    """`y_t += x_t W_t` for every module of a layer; W_t of the token's task is never built."""

    def __init__(self, modules: Sequence[TaskStateModule[TaskState]], dtype: torch.dtype) -> None:
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
        self._states = torch.zeros(0, size, dtype=dtype)  # by place
        self._keys: dict[int, object] = {}  # of the place when its state was derived
        self._ready: StepPlan | None = None

    @property
    def state_bytes(self) -> int:
        """The size of one task's state."""
        return self._states.itemsize * self._states.shape[1]

    def add_(self, y: Tensor, x: Tensor, step: StepRouting) -> None:
        """Add the adapters' contribution for x [T, d_in] to y [T, d], in place."""
        # Without states every token would silently get the base model's answer.
        assert step.plan.places or not len(step.rows), "the plan names no task's state"
        if step.plan is not self._ready:
            self._derive(step)
        self._add_(y, x, self._states, self._parts, step.places)

    def _derive(self, step: StepRouting) -> None:
        """Derive the states that are missing, all at once."""
        fresh = [
            (row, place.number, place.key)
            for row, place in step.plan.places
            if self._keys.get(place.number) is not place.key
        ]
        if fresh:
            rows, numbers, keys = zip(*fresh, strict=True)
            self._enlarge(max(numbers) + 1)
            weights = step.weights[list(rows)]
            states = [m.derive(weights[:, m.index]).packed(self._dtype) for m in self._modules]
            self._states[list(numbers)] = torch.cat(states, 1)
            self._keys.update(zip(numbers, keys, strict=True))
        self._ready = step.plan

    def _enlarge(self, places: int) -> None:
        if places > len(self._states):
            larger = self._states.new_zeros(2 * places, self._states.shape[1])
            larger[: len(self._states)] = self._states
            self._states = larger
