"""TensorPoly-II: leaves mixed per task and order, so that a task's adapter is tiny."""

from __future__ import annotations

import torch
from torch import Tensor

from polyrex.adapters.spec import AdapterSpec
from polyrex.kernels.factored import FactoredSides
from polyrex.kernels.routing import ModuleRouting

from .composed import LowRank
from .protocol import Operands, Space
from .tensor_product import (
    FactoredSide,
    factor_leaves,
    factored_expand,
    factored_shrink,
    fused_factor,
)
from .tensorpoly_1 import TensorPoly1Experts, factored_sides


class TensorPoly2Experts(TensorPoly1Experts):
    """TensorPoly-II: the leaf of order n is `sum_e w_tne leaf[n, e]`, then as in TLoRA.

    `delta = gate * B_t A_t x / r`. Everything after the routing is one task's and tiny, N*r*q
    numbers a side, so A_t and B_t are never built: the leaves are mixed once for every distinct
    row of the routing table, and each token is contracted with its own.
    """

    method = "tensorpoly-2"
    examples = (
        AdapterSpec("tensorpoly-2", rank=3, experts=5),
        AdapterSpec("tensorpoly-2", rank=3, experts=5, order=4),
        AdapterSpec("tensorpoly-2", rank=3, experts=5, order=3, norm="none"),
    )

    @property
    def space(self) -> Space:
        return "leaf"

    @classmethod
    def routing_size(cls, spec: AdapterSpec) -> int:
        return spec.order * spec.experts

    def operands(self, dtype: torch.dtype) -> Operands:
        wide = torch.promote_types(dtype, torch.float32)  # products of leaves are not for bfloat16
        leaves = torch.cat((self.weight_leafs_a.flatten(2), self.weight_leafs_b.flatten(2)), -1)
        return leaves.to(wide), (self.gate / self.spec.rank).to(wide)

    def mixed_leaves(self, operands: Operands, weights: Tensor) -> tuple[Tensor, Tensor]:
        """D tasks' leaves of both sides, [N, D, r, q], from their routing weights [D, W]."""
        leaves, _ = operands  # [N, E, r * (q_in + q_out)]
        order, experts, rank = *leaves.shape[:2], self.spec.rank
        by_order = weights.view(-1, order, experts).transpose(0, 1).to(leaves.dtype)
        mixed = torch.bmm(by_order, leaves)  # [N, D, r * (q_in + q_out)]
        split = self.weight_leafs_a[0, 0].numel()
        side_a, side_b = mixed[..., :split], mixed[..., split:]
        shape = order, len(weights), rank, -1
        return side_a.reshape(shape), side_b.reshape(shape)

    def task_state(self, operands: Operands, weights: Tensor) -> FactoredSides:
        return factored_sides(*self.task_sides(operands, weights), operands[1])

    def task_sides(self, operands: Operands, weights: Tensor) -> tuple[FactoredSide, FactoredSide]:
        """Both sides of D tasks' adapters, from their rows of routing weights [D, W]."""
        leaves_a, leaves_b = self.mixed_leaves(operands, weights)
        return factor_leaves(leaves_a, self.spec.norm), factor_leaves(leaves_b, self.spec.norm)

    def compose(self, operands: Operands, weights: Tensor, dtype: torch.dtype) -> LowRank:
        leaves_a, leaves_b = self.mixed_leaves(operands, weights)
        b = fused_factor(leaves_b, self.target.d_out, self.spec.norm, dtype)
        return LowRank(
            fused_factor(leaves_a, self.target.d_in, self.spec.norm, dtype),
            b * operands[1].to(dtype),
        )

    def delta(self, operands: Operands, x: Tensor, routing: ModuleRouting) -> Tensor:
        leaves, scale = operands
        side_a, side_b = self.task_sides(operands, routing.weights)
        hidden = factored_shrink(x.to(leaves.dtype), side_a.take(routing.rows)) * scale
        return factored_expand(hidden, side_b.take(routing.rows), self.target.d_out).to(x.dtype)
