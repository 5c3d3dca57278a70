"""Adapters of the modules in one layer of an engine, on the Triton kernels.

A layer only launches kernels: one for all A sides and one for all B sides. What they read is at the
same addresses in every step, so that a CUDA graph can hold a layer. Of its two parts, `shrink`
needs x alone: it can run beside the frozen product.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from polyrex.kernels.leaf_states import LeafStates
from polyrex.kernels.modules import Hidden, LayerModule, LeafModule
from polyrex.kernels.routing import StepRouting

from .factored import LeafSide, factored_expand, factored_shrink
from .pair_space import pair_shrink
from .rank_space import OutputSides, TableRows, routed_expand, routed_shrink


class TritonLayer:
    """`y_t += B_t A_t x_t` for every module of a layer, in two parts."""

    state_bytes = 0

    def add_(self, y: Tensor, x: Tensor, step: StepRouting) -> None:
        """Add the adapters' contribution for x [T, d_in] to y [T, d], in place."""
        self.expand_(y, self.shrink(x, step), step)

    @abstractmethod
    def shrink(self, x: Tensor, step: StepRouting) -> Hidden:
        """What the A sides make of x [T, d_in]."""

    @abstractmethod
    def expand_(self, y: Tensor, hidden: Hidden, step: StepRouting) -> None:
        """Add what the B sides make of it to y [T, d], in place."""


class TritonRankSpaceLayer(TritonLayer):
    """Experts' sides, mixed with S = 1 by a token's routing weights."""

    def __init__(self, modules: Sequence[LayerModule]) -> None:
        self._a = torch.cat([m.a[0][:, m.inputs] for m in modules]).contiguous()
        self._b = OutputSides.of([(m.column, m.b[0][:, m.outputs]) for m in modules])
        self._indices = torch.tensor([m.index for m in modules]).to(self._a.device)

    def shrink(self, x: Tensor, step: StepRouting) -> Hidden:
        return routed_shrink(x, self._a, TableRows(step.weights, step.rows, self._indices))

    def expand_(self, y: Tensor, hidden: Hidden, step: StepRouting) -> None:
        routed_expand(y, hidden, self._b)


class TritonPairSpaceLayer(TritonRankSpaceLayer):
    """Static T-REX: `y_t += B G_t^T A x_t`, with G_t [I, J] the token's routing weights."""

    def shrink(self, x: Tensor, step: StepRouting) -> Hidden:
        routing = TableRows(step.weights, step.rows, self._indices)
        return pair_shrink(x, self._a, routing, len(self._b.values))


class TritonLeafLayer(TritonLayer):
    """Sides of each task's own, which exist only as leaves."""

    def __init__(self, modules: Sequence[LeafModule], states: LeafStates) -> None:
        self._modules, self._states = modules, states
        self.state_bytes = sum(states.add(module) for module in modules)

    @cached_property
    def _sides(self) -> tuple[list[LeafSide], list[LeafSide]]:
        """The A sides and the B sides; where they are is known once there are states."""
        both = [(m, *self._states.sides(m)) for m in self._modules]
        a = [LeafSide.of(side, m.inputs) for m, side, _ in both]
        b = [LeafSide.of(side, m.outputs) for m, _, side in both]
        return a, b

    def shrink(self, x: Tensor, step: StepRouting) -> Hidden:
        return factored_shrink(x, self._states.values, step.places, self._sides[0])

    def expand_(self, y: Tensor, hidden: Hidden, step: StepRouting) -> None:
        sides, columns = self._sides[1], tuple(m.column for m in self._modules)
        factored_expand(y, hidden, self._states.values, step.places, sides, columns)
