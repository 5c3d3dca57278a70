"""Rank-space adapters of the modules that one layer of an engine holds, on the compiled operators.

The operators, `torch.ops.polyrex` (source: rank_space.cpp), take all matrices of a side as one
tensor, each packed by `pack`, and `parts`, int64 [P, 7], a row a matrix: where its inputs (or
outputs) begin and how many they are, where its h lies among all n of them, where its routing
weights begin in a row of `weights` or -1 for a weight of 1, where its values begin, its panels and
its depth. `weights` is [D, M, W] float32, `rows` [T] int64.

    add_(y [T, d], x [T, d_in], a, a_parts, b, b_parts, n, E, weights, rows)
        y_t += B_t A_t x_t, with A_t = sum_e w_te A_e never built
    add_pairs_(y, x, a, a_parts, b, b_parts, n, I, J, weights, rows)
        y_t += B G_t^T A x_t, where G_t [I, J] is the token's weights
    add_by_token_(y, x, a, a_parts, b, b_parts, n, I, J, G, k, scales, weights, rows)
        the same with gates that tokens choose: see token_space_layer.py
    compose(a, a_parts, E, in_panels, weights [M * W]) -> A_t, as a side of one expert

R is r rounded up to whole panels of 16 columns; everything is summed in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from polyrex.kernels.routing import StepRouting
from polyrex.kernels.step_plan import Entry

LANES = 16
UNWEIGHTED = -1


def pack(matrix: Tensor) -> Tensor:
    """[depth, columns] -> panels of 16 columns, padded with zeros; see rank_space.cpp.

    float32: [panels, depth, 16]; bfloat16: [panels, depth / 2, 16, 2].
    """
    depth, columns = matrix.shape
    padded = F.pad(matrix, (0, -columns % LANES, 0, -depth % LANES))
    panels = padded.view(len(padded), -1, LANES).transpose(0, 1)
    if matrix.dtype == torch.bfloat16:
        panels = panels.reshape(len(panels), -1, 2, LANES).transpose(2, 3)
    return panels.contiguous()


def padded(size: int) -> int:
    """Rounded up to whole panels."""
    return size + -size % LANES


def by_expert(side: Tensor, experts: int) -> Tensor:
    """[E*r, d] -> [E*R, d], each expert's rows padded with zeros to whole panels."""
    rank = len(side) // experts
    return F.pad(side.view(experts, rank, -1), (0, 0, 0, -rank % LANES)).flatten(0, 1)


@dataclass(frozen=True)
class LayerModule:
    """A target module as an engine's layer holds it: all of it, or what tensor parallelism leaves.

    a [S, E*r, d_in/S] and b [S, E*r, d_out/S] are the whole module's; `inputs` and `outputs` are
    the parts of d_in and d_out that are here, and `column` is where the outputs begin in the
    layer's. `index` is the module's number in the routing table.
    """

    index: int
    a: Tensor
    b: Tensor
    inputs: slice
    outputs: slice
    column: int


class Part(NamedTuple):
    """Where a matrix reads or writes, as the operators know it."""

    begin: int
    length: int
    hidden: int  # where its h lies
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
        """The parts of one task's side, as `compose` makes it."""
        parts = self.parts.clone()
        parts[:, 3] = UNWEIGHTED
        parts[:, 4] //= experts  # start
        parts[:, 6 if in_panels else 5] //= experts  # depth, or panels
        return parts


def _cut(held: slice, block: int, size: int) -> slice:
    """What is here of block number `block` of `size`, as positions in the whole dimension."""
    begin = max(held.start, block * size)
    return slice(begin, max(begin, min(held.stop, (block + 1) * size)))


class RankSpaceLayer:
    """`y_t += B_t A_t x_t` for every module of a layer, shared or composed as the plan says."""

    def __init__(self, modules: Sequence[LayerModule], experts: int, width: int) -> None:
        """`width` is W, the routing weights of one module in a row."""
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
        # The operator itself: finding it by name takes as long as a small product.
        self._add_ = torch.ops.polyrex.add_.default
        self._composed: dict[int, tuple[object, Tensor, Tensor]] = {}

    @property
    def state_bytes(self) -> int:
        """What one task's composed A and B take."""
        return (self._a.values.nbytes + self._b.values.nbytes) // self._experts

    def add_(self, y: Tensor, x: Tensor, step: StepRouting) -> None:
        """Add the adapters' part for x [T, d_in] to y [T, d], whose columns lie side by side."""
        n, weights, rows = self._hidden, step.weights, step.rows
        if not step.plan.runs:
            sides = self._a.values, self._a.parts, self._b.values, self._b.parts
            self._add_(y, x, *sides, n, self._experts, weights, rows)
        for run in step.plan.runs:
            a, b = self._compose(run.entry, weights, run.row)
            own_y, own_x = y[run.begin : run.end], x[run.begin : run.end]
            self._add_(own_y, own_x, a, self._own_a, b, self._own_b, n, 1, weights, rows)

    def _compose(self, entry: Entry, weights: Tensor, row: int) -> tuple[Tensor, Tensor]:
        """A task's own A and B, made from its row of weights where they are not kept yet."""
        known = self._composed.get(entry.place)
        if known is not None and known[0] is entry.key:
            return known[1:]
        flat, compose = weights[row].flatten(), torch.ops.polyrex.compose
        a = compose(self._a.values, self._a.parts, self._experts, False, flat)
        b = compose(self._b.values, self._b.parts, self._experts, True, flat)
        self._composed[entry.place] = entry.key, a, b
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
        """Add the adapters' part for x [T, d_in] to y [T, d], in place."""
        sides = self._a.values, self._a.parts, self._b.values, self._b.parts
        pairs = self._inner, self._outer
        self._add_(y, x, *sides, self._hidden, *pairs, step.weights, step.rows)
