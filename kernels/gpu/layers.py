"""Adapters of the modules in one layer of an engine, on the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyrex.kernels.factored import FactoredSides
from polyrex.kernels.modules import FactoredModule, LayerModule, TaskState, TaskStateModule
from polyrex.kernels.routing import StepRouting

from .factored import factored_expand, factored_shrink
from .pair_space import pair_shrink
from .rank_space import routed_expand, routed_shrink


def _b_sides(modules: Sequence[LayerModule]) -> list[tuple[slice, Tensor]]:
    """The columns of y that each module adds to, and its B side [E*r, columns]."""
    sides = []
    for m in modules:
        width = m.outputs.stop - m.outputs.start
        columns = slice(m.column, m.column + width)
        sides.append((columns, m.b[0][:, m.outputs].contiguous()))
    return sides


class TritonRankSpaceLayer:
    """`y_t += B_t A_t x_t` for every module of a layer, S = 1, on the shared path."""

    state_bytes = 0

    def __init__(self, modules: Sequence[LayerModule]) -> None:
        self._a = torch.cat([m.a[0][:, m.inputs] for m in modules]).contiguous()
        self._b = _b_sides(modules)
        self._indices = torch.tensor([m.index for m in modules], device=self._a.device)

    def add_(self, y: Tensor, x: Tensor, step: StepRouting) -> None:
        """Add the adapters' contribution for x [T, d_in] to y [T, d], in place."""
        weights = step.by_token.index_select(1, self._indices)
        h = routed_shrink(x, self._a, weights)
        for number, (columns, b) in enumerate(self._b):
            routed_expand(y[:, columns], h[:, number], b, weights[:, number])


class TritonPairSpaceLayer:
    """`y_t += B G_t^T A x_t` for every module of a layer: static T-REX."""

    state_bytes = 0

    def __init__(self, modules: Sequence[LayerModule]) -> None:
        self._a = [(m.index, m.a[0][:, m.inputs].contiguous()) for m in modules]
        self._b = _b_sides(modules)

    def add_(self, y: Tensor, x: Tensor, step: StepRouting) -> None:
        """Add the adapters' contribution for x [T, d_in] to y [T, d], in place."""
        for (index, a), (columns, b) in zip(self._a, self._b, strict=True):
            pairs = step.by_token[:, index].view(len(x), len(a), len(b))
            h = pair_shrink(x, a, pairs)
            # A token without an adapter has h = 0: weight 1 adds nothing.
            routed_expand(y[:, columns], h, b, h.new_ones(len(x), 1))


class TritonFactoredLayer:
    """`y_t += B_t A_t x_t`, mixing experts whose sides exist only as leaves."""

    state_bytes = 0

    def __init__(self, modules: Sequence[FactoredModule]) -> None:
        self._modules = modules

    def add_(self, y: Tensor, x: Tensor, step: StepRouting) -> None:
        """Add the adapters' contribution for x [T, d_in] to y [T, d], in place."""
        for m in self._modules:
            _add_factored(y[:, m.columns], x, m.sides, None, step.by_token[:, m.index])


class TritonLeafLayer:
    """`y_t += B_t A_t x_t` with leaves of each task, mixed from those of the experts."""

    state_bytes = 0

    def __init__(self, modules: Sequence[TaskStateModule[TaskState]]) -> None:
        self._modules = modules
        self._weights: Tensor | None = None  # from which `_sides` were mixed
        self._sides: list[FactoredSides] = []

    def add_(self, y: Tensor, x: Tensor, step: StepRouting) -> None:
        """Add the adapters' contribution for x [T, d_in] to y [T, d], in place."""
        if step.weights is not self._weights:  # as long as the same requests go on, it is
            self._sides = [_leaves(m, step.weights[:, m.index]) for m in self._modules]
            self._weights = step.weights
        for m, sides in zip(self._modules, self._sides, strict=True):
            columns = slice(m.column, m.column + m.d_out)
            _add_factored(y[:, columns], x, sides, step.rows, None)


def _leaves(module: TaskStateModule[TaskState], weights: Tensor) -> FactoredSides:
    sides = module.derive(weights)
    assert isinstance(sides, FactoredSides), "leaf space: the state of a task is its leaves"
    return sides


def _add_factored(
    y: Tensor, x: Tensor, sides: FactoredSides, rows: Tensor | None, weights: Tensor | None
) -> None:
    """Add `B A x` to y for sides of experts with `weights` [T, E], or of tasks with `rows` [T]."""
    h = factored_shrink(x, sides.a_first, sides.a_second, sides.a_shift, rows, weights)
    factored_expand(y, h, sides.b_first, sides.b_second, sides.b_shift, rows, weights)
