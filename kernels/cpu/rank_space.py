"""Rank-space adapters of the modules in one layer of an engine, on the compiled operators.

The operators, `torch.ops.polyrex` (source: csrc/rank_space.cpp), take all matrices of a side as one
tensor, each packed by `pack`, and `parts`, int64 [P, 7], with a row for each matrix: where its
inputs (or outputs) begin and how many there are, where its h begins among all n floats of h, where
its routing weights begin in a row of `weights` (-1 for a weight of 1), where its values begin, its
panels and its depth. `weights` is [D, M, W] float32, `rows` [T] int64.

    add_(y [T, d], x [T, d_in], a, a_parts, b, b_parts, n, E, weights, rows)
        y_t += B_t A_t x_t, with A_t = sum_e w_te A_e never built
    add_pairs_(y, x, a, a_parts, b, b_parts, n, I, J, weights, rows)
        y_t += B G_t^T A x_t, where G_t [I, J] is the token's weights
    add_by_token_(y, x, a, a_parts, b, b_parts, n, I, J, G, k, scales, weights, rows)
        the same with gates that tokens choose: see token_gates.py
    compose(a, a_parts, E, in_panels, weights [M * W]) -> A_t, as a side of one expert

R is r padded to whole panels of 16 columns; all sums are in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from polyrex.kernels.modules import LayerModule
from polyrex.kernels.packing import LANES, UNWEIGHTED, by_expert, pack, padded
from polyrex.kernels.places import Place
from polyrex.kernels.routing import StepRouting


class Part(NamedTuple):
    """The columns and the weights of a matrix: the first four of a row of `parts`."""

    begin: int  # of its inputs, or outputs
    length: int
    hidden: int  # where its h begins
    offset: int  # where its routing weights begin, or UNWEIGHTED


@dataclass(frozen=True)
class Side:
    """The packed matrices of one side."""

    values: Tensor
    parts: Tensor  # int64 [P, 7]

    @classmethod
    def of(cls, pieces: Sequence[tuple[Tensor, Part]]) -> Side:
        packed = [pack(matrix) for matrix, _ in pieces]
        starts = itertools.accumulate((each.numel() for each in packed), initial=0)
        parts = [
            (*part, start, len(each), each.numel() // (len(each) * LANES))
            for each, (_, part), start in zip(packed, pieces, starts, strict=False)
        ]
        return cls(torch.cat([each.flatten() for each in packed]), torch.tensor(parts))

    def composed(self, experts: int, in_panels: bool) -> Tensor:
        """The `parts` of one task's side, as `compose` returns it."""
        parts = self.parts.clone()
        parts[:, 3] = UNWEIGHTED
        parts[:, 4] //= experts  # start
        parts[:, 6 if in_panels else 5] //= experts  # depth, or panels
        return parts


def _cut(held: slice, block: int, size: int) -> slice:
    """The part of block number `block` of `size` that `held` holds, in the whole dimension."""
    begin = max(held.start, block * size)
    return slice(begin, max(begin, min(held.stop, (block + 1) * size)))


class RankSpaceLayer:
    """`y_t += B_t A_t x_t` for every module of a layer, shared or composed as the plan says."""

    def __init__(self, modules: Sequence[LayerModule], experts: int, width: int) -> None:
        """`width` is W, the routing weights a row holds for one module."""
        rank = padded(modules[0].a.shape[1] // experts)
        self._hidden, self._experts = len(modules) * rank, experts
        shrink, expand = [], []
        for number, module in enumerate(modules):
            for split, (a, b) in enumerate(zip(module.a, module.b, strict=True)):
                weights = module.index * width + split * experts
                inputs = _cut(module.inputs, split, a.shape[1])
                if inputs.start < inputs.stop:
                    first, begin = split * a.shape[1], inputs.start - module.inputs.start
                    piece = a[:, inputs.start - first : inputs.stop - first]
                    part = Part(begin, piece.shape[1], number * rank, weights)
                    shrink.append((by_expert(piece, experts).t(), part))
                outputs = _cut(module.outputs, split, b.shape[1])
                if outputs.start < outputs.stop:
                    first = split * b.shape[1]
                    begin = module.column + outputs.start - module.outputs.start
                    piece = b[:, outputs.start - first : outputs.stop - first]
                    part = Part(begin, piece.shape[1], number * rank, weights)
                    expand.append((by_expert(piece, experts), part))
        self._a, self._b = Side.of(shrink), Side.of(expand)
        self._own_a = self._a.composed(experts, in_panels=False)
        self._own_b = self._b.composed(experts, in_panels=True)
        # Keeps the operator: to look it up by name takes as long as a small product.
        self._add_ = torch.ops.polyrex.add_.default
        self._composed: dict[int, tuple[object, Tensor, Tensor]] = {}

    @property
    def state_bytes(self) -> int:
        """The size of one task's composed A and B."""
        return (self._a.values.nbytes + self._b.values.nbytes) // self._experts

    def add_(self, y: Tensor, x: Tensor, step: StepRouting) -> None:
        """Add the adapters' contribution for x [T, d_in] to y [T, d], in place."""
        n, weights, rows = self._hidden, step.weights, step.rows
        if not step.plan.runs:
            sides = self._a.values, self._a.parts, self._b.values, self._b.parts
            self._add_(y, x, *sides, n, self._experts, weights, rows)
        for run in step.plan.runs:
            a, b = self._compose(run.place, weights, run.row)
            own_y, own_x = y[run.begin : run.end], x[run.begin : run.end]
            self._add_(own_y, own_x, a, self._own_a, b, self._own_b, n, 1, weights, rows)

    def _compose(self, place: Place, weights: Tensor, row: int) -> tuple[Tensor, Tensor]:
        """A task's own A and B: kept in its place, or else composed from its row of weights."""
        known = self._composed.get(place.number)
        if known is not None and known[0] is place.key:
            return known[1:]
        flat, compose = weights[row].flatten(), torch.ops.polyrex.compose
        a = compose(self._a.values, self._a.parts, self._experts, False, flat)
        b = compose(self._b.values, self._b.parts, self._experts, True, flat)
        self._composed[place.number] = place.key, a, b
        return a, b


class PairSpaceLayer:
    """`y_t += B G_t^T A x_t` for every module of a layer: static T-REX.

    A module's a is [1, I, d_in], its b [1, J, d_out]; a row of routing weights is G, [I, J].
    """

    def __init__(self, modules: Sequence[LayerModule]) -> None:
        self._inner, self._outer = modules[0].a.shape[1], modules[0].b.shape[1]
        width, rank = self._inner * self._outer, padded(self._inner)
        shrink, expand = [], []
        for number, m in enumerate(modules):
            a, b = m.a[0][:, m.inputs], m.b[0][:, m.outputs]
            shrink.append((by_expert(a, 1).t(), Part(0, a.shape[1], number * rank, UNWEIGHTED)))
            part = Part(m.column, b.shape[1], number * rank, m.index * width)
            expand.append((by_expert(b, 1), part))
        self._hidden = len(modules) * rank
        self._a, self._b = Side.of(shrink), Side.of(expand)
        self._add_ = torch.ops.polyrex.add_pairs_.default

    state_bytes = 0

    def add_(self, y: Tensor, x: Tensor, step: StepRouting) -> None:
        """Add the adapters' contribution for x [T, d_in] to y [T, d], in place."""
        sides = self._a.values, self._a.parts, self._b.values, self._b.parts
        pairs = self._inner, self._outer
        self._add_(y, x, *sides, self._hidden, *pairs, step.weights, step.rows)
