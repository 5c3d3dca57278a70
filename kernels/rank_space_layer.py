"""Rank-space adapters of the modules that one layer of an engine holds, on the compiled operators.

The operators, `torch.ops.polyrex` (sources: rank_space.cpp), take matrices packed by `pack` and
say which routing weights belong to which matrix by `parts`, int64 [P, 4]: where a matrix's inputs
(or outputs) begin, how many they are, which h it belongs to, and where its E weights begin in a
row of routing weights, or -1 for a weight of 1. `weights` is [D, M, W] float32, `rows` [T] int64.

| operator | result |
|---|---|
| add_(y [T, d], x [T, d_in], a, a_parts, b, b_parts, n, E, weights, rows) | both, one by one |
| shrink(x [T, d_in], a, parts, n, E, weights, rows) | h [T, n, R] float32: `sum_e w_te (A_e x_t)` |
| expand_(y [T, d], h, b, parts, E, weights, rows) | `y_t += sum_e w_te (B_e h_t)` |
| compose(packed [G, E, size], weights [E]) | [G, size]: `sum_e w_e packed_e` |
| mix_pairs(h [T, n, I], offsets [n], I, J, weights, rows) | [T, n, J]: `G_t^T h_t` |

R is r rounded up to whole panels of 16 columns; everything is summed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .plan import Entry
from .routing import StepRouting

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


@dataclass(frozen=True)
class _Side:
    """Packed matrices, and where each reads or writes."""

    matrices: list[Tensor]
    parts: Tensor  # int64 [P, 4]
    unweighted: Tensor  # the same for composed matrices

    @staticmethod
    def of(pieces: Sequence[tuple[Tensor, tuple[int, int, int, int]]]) -> _Side:
        parts = torch.tensor([part for _, part in pieces])
        unweighted = parts.clone()
        unweighted[:, 3] = UNWEIGHTED
        return _Side([pack(matrix) for matrix, _ in pieces], parts, unweighted)


def _cut(held: slice, block: int, size: int) -> slice:
    """What is here of block number `block` of `size`, as positions in the whole dimension."""
    begin = max(held.start, block * size)
    return slice(begin, max(begin, min(held.stop, (block + 1) * size)))


class RankSpaceLayer:
    """`y_t += B_t A_t x_t` for every module of a layer, shared or composed as the plan says."""

    def __init__(self, modules: Sequence[LayerModule], experts: int, width: int) -> None:
        """`width` is W, the routing weights of one module in a row."""
        self._modules, self._experts = len(modules), experts
        shrink, expand = [], []
        for number, module in enumerate(modules):
            for split, (a, b) in enumerate(zip(module.a, module.b, strict=True)):
                weights = module.index * width + split * experts
                inputs = _cut(module.inputs, split, a.shape[1])
                if inputs.start < inputs.stop:
                    first, begin = split * a.shape[1], inputs.start - module.inputs.start
                    piece = a[:, inputs.start - first : inputs.stop - first]
                    part = (begin, piece.shape[1], number, weights)
                    shrink.append((by_expert(piece, experts).t(), part))
                outputs = _cut(module.outputs, split, b.shape[1])
                if outputs.start < outputs.stop:
                    first = split * b.shape[1]
                    begin = module.column + outputs.start - module.outputs.start
                    piece = b[:, outputs.start - first : outputs.stop - first]
                    part = (begin, piece.shape[1], number, weights)
                    expand.append((by_expert(piece, experts), part))
        self._a, self._b = _Side.of(shrink), _Side.of(expand)
        # The operator itself: finding it by name takes as long as a small product.
        self._add_ = torch.ops.polyrex.add_.default
        self._composed: dict[int, tuple[object, list[Tensor], list[Tensor]]] = {}

    @property
    def state_bytes(self) -> int:
        """What one task's composed A and B take."""
        return sum(m.nbytes for m in (*self._a.matrices, *self._b.matrices)) // self._experts

    def add_(self, y: Tensor, x: Tensor, step: StepRouting) -> None:
        """Add the adapters' part for x [T, d_in] to y [T, d], whose columns lie side by side."""
        a, b, n, routing = self._a, self._b, self._modules, (step.weights, step.rows)
        if not step.plan.runs:
            self._add_(y, x, a.matrices, a.parts, b.matrices, b.parts, n, self._experts, *routing)
        for run in step.plan.runs:
            own_a, own_b = self._compose(run.entry, step.weights, run.row)
            own_y, own_x = y[run.begin : run.end], x[run.begin : run.end]
            self._add_(own_y, own_x, own_a, a.unweighted, own_b, b.unweighted, n, 1, *routing)

    def _compose(
        self, entry: Entry, weights: Tensor, row: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """A task's own A and B, made from its row of weights where they are not kept yet."""
        known = self._composed.get(entry.place)
        if known is not None and known[0] is entry.key:
            return known[1:]
        flat = weights[row].flatten()
        a, b = (
            [
                self._composed_matrix(matrix, flat[offset : offset + self._experts], on_a)
                for matrix, offset in zip(side.matrices, side.parts[:, 3].tolist(), strict=True)
            ]
            for side, on_a in ((self._a, True), (self._b, False))
        )
        self._composed[entry.place] = entry.key, a, b
        return a, b

    def _composed_matrix(self, matrix: Tensor, weights: Tensor, on_a: bool) -> Tensor:
        # An expert's part is whole panels on the A side, and a stretch of every panel on B's.
        groups = 1 if on_a else len(matrix)
        composed: Tensor = torch.ops.polyrex.compose(
            matrix.view(groups, self._experts, -1), weights
        )
        panels = len(matrix) // self._experts if on_a else len(matrix)
        return composed.view(panels, -1, *matrix.shape[2:])


class PairSpaceLayer:
    """`y_t += B G_t^T A x_t` for every module of a layer: static T-REX.

    A module's a is [1, I, d_in], its b [1, J, d_out]; a row of routing weights is G, [I, J].
    """

    def __init__(self, modules: Sequence[LayerModule]) -> None:
        self._inner, self._outer = modules[0].a.shape[1], modules[0].b.shape[1]
        width = self._inner * self._outer
        shrink, expand = [], []
        for number, m in enumerate(modules):
            a, b = m.a[0][:, m.inputs], m.b[0][:, m.outputs]
            shrink.append((by_expert(a, 1).t(), (0, a.shape[1], number, UNWEIGHTED)))
            expand.append((by_expert(b, 1), (m.column, b.shape[1], number, UNWEIGHTED)))
        self._a, self._b = _Side.of(shrink), _Side.of(expand)
        self._offsets = torch.tensor([m.index * width for m in modules])

    state_bytes = 0

    def add_(self, y: Tensor, x: Tensor, step: StepRouting) -> None:
        """Add the adapters' part for x [T, d_in] to y [T, d], in place."""
        ops, routing = torch.ops.polyrex, (step.weights, step.rows)
        h = ops.shrink(x, self._a.matrices, self._a.parts, len(self._offsets), 1, *routing)
        mixed = ops.mix_pairs(h, self._offsets, self._inner, self._outer, *routing)
        ops.expand_(y, mixed, self._b.matrices, self._b.parts, 1, *routing)
