"""TensorPoly-I: experts whose sides are tensor products of leaves, mixed in rank space."""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from polyrex.adapters.errors import SpecError
from polyrex.adapters.spec import AdapterSpec, TargetModule
from polyrex.kernels.factored import FactoredSides
from polyrex.kernels.leaf_size import leaf_size

from .protocol import LearningRates, Operands
from .rank_space import RankSpaceExperts
from .tensor_product import FactoredSide, fused_factor


class TensorPoly1Experts(RankSpaceExperts):
    """TensorPoly-I: expert e is the TLoRA factor of its leaves, mixed as in Poly.

    `delta = gate * (sum_e w_te B_e)(sum_e w_te A_e) x / r`. The scalar gate is ours: the
    normalisation of the released code leaves neither side at zero, so it starts at 0 instead
    (the released code means gate = 1).
    """

    method = "tensorpoly-1"
    uses = frozenset({"rank", "experts", "order", "norm", "granularity"})
    # Leaves are drawn from N(0, 1) and have far to go.
    rates = LearningRates(experts=0.3, gates=0.03, routing=0.8)
    roles = MappingProxyType(
        {"weight_leafs_a": "experts", "weight_leafs_b": "experts", "gate": "gates"}
    )
    no_lora = None
    examples: ClassVar[tuple[AdapterSpec, ...]] = (
        AdapterSpec("tensorpoly-1", rank=3, experts=5),
        AdapterSpec("tensorpoly-1", rank=3, experts=5, order=4),
        AdapterSpec("tensorpoly-1", rank=3, experts=5, order=3, norm="none"),
    )

    def __init__(self, spec: AdapterSpec, target: TargetModule) -> None:
        super().__init__(spec, target)
        shape = (spec.order, spec.experts, spec.rank)
        self.weight_leafs_a = nn.Parameter(torch.empty(*shape, leaf_size(target.d_in, spec.order)))
        self.weight_leafs_b = nn.Parameter(torch.empty(*shape, leaf_size(target.d_out, spec.order)))
        self.gate = nn.Parameter(torch.empty(()))

    @classmethod
    def check(cls, spec: AdapterSpec) -> None:
        super().check(spec)
        if spec.norm == "layer" and spec.order not in (2, 4):
            raise SpecError(
                f"{spec.method}: norm=layer is defined for order 2 and 4, got {spec.order}"
            )

    def reset(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.weight_leafs_a, generator=generator)
        nn.init.normal_(self.weight_leafs_b, generator=generator)
        nn.init.zeros_(self.gate)

    def operands(self, dtype: torch.dtype) -> Operands:
        norm = self.spec.norm
        a = fused_factor(self.weight_leafs_a, self.target.d_in, norm, dtype)  # [E, r, d_in]
        b = fused_factor(self.weight_leafs_b, self.target.d_out, norm, dtype)  # [E, r, d_out]
        b = b * (self.gate / self.spec.rank).to(dtype)
        return a.flatten(0, 1).unsqueeze(0), b.flatten(0, 1).unsqueeze(0)


def factored_sides(a: FactoredSide, b: FactoredSide, scale: Tensor) -> FactoredSides:
    """Both sides as the kernels read them, with the scale folded into the B side."""
    a_first, a_second, b_first, b_second = (
        leaves.contiguous() for leaves in (a.first, a.second, b.first * scale, b.second)
    )
    shift = None if b.shift is None else b.shift * scale
    return FactoredSides(a_first, a_second, a.shift, b_first, b_second, shift)
