"""Experts that are mixed in rank space: what Poly, MHR, LoRA and TensorPoly-I share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from polyrex.adapters.spec import AdapterSpec
from polyrex.kernels.rank_space import rank_space
from polyrex.kernels.routing import ModuleRouting

from .composed import LowRank
from .protocol import Experts, Operands, Space, normalised_gates


def initial_side(weight: Tensor, d_in: int, generator: torch.Generator) -> None:
    """Draw a matrix whose products with inputs of unit variance have unit variance."""
    bound = math.sqrt(3 / d_in)
    nn.init.uniform_(weight, -bound, bound, generator=generator)


class RankSpaceExperts(Experts):
    """Experts whose delta is `B_t A_t x`, with A_t and B_t mixed from E experts on S blocks."""

    @property
    def space(self) -> Space:
        return "rank"

    @classmethod
    def splits(cls, spec: AdapterSpec) -> int:
        """S: how many blocks the two dimensions are cut into."""
        return 1

    @classmethod
    def routing_size(cls, spec: AdapterSpec) -> int:
        return cls.splits(spec) * spec.experts

    @classmethod
    def route(cls, spec: AdapterSpec, logits: Tensor, *, sample: bool = False) -> Tensor:
        return normalised_gates(logits, spec.experts, sample=sample)

    def compose(self, operands: Operands, weights: Tensor, dtype: torch.dtype) -> LowRank:
        experts = self.spec.experts
        by_split = weights.view(len(weights), -1, experts).transpose(0, 1)  # [S, D, E]

        def mixed(side: Tensor) -> Tensor:  # [S, E*r, d/S] -> [D, r, d]
            rank = side.shape[1] // experts
            product = torch.bmm(by_split.to(side.dtype), side.reshape(len(side), experts, -1))
            by_row = product.view(len(side), len(weights), rank, -1).permute(1, 2, 0, 3)
            return by_row.flatten(2).to(dtype)

        a, b = operands
        return LowRank(mixed(a), mixed(b))

    def delta(self, operands: Operands, x: Tensor, routing: ModuleRouting) -> Tensor:
        a, b = operands
        weights = routing.token_weights.view(len(x), a.shape[0], self.spec.experts)
        return rank_space(x, a, b, weights)
