"""LoRA, Poly and MHR: low-rank experts whose A and B sides are mixed with the same weights."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor, nn

from polyrex.adapters.errors import SpecError
from polyrex.adapters.spec import AdapterSpec, TargetModule

from .protocol import Experts, LearningRates, Operands
from .rank_space import RankSpaceExperts, initial_side


class MhrExperts(RankSpaceExperts):
    """MHR (multi-head routing): `delta = B_t A_t x / r`, S blocks a side with weights of their own.

    A_t's columns of input block s are `sum_e w_tse A_se`, B_t's rows of output block s are
    `sum_e w_tse B_se`. S = 1 is Poly.
    """

    method = "mhr"
    uses = frozenset({"rank", "experts", "splits", "granularity"})
    # As poly and lora, it divides by the rank: steps must be larger.
    rates = LearningRates(experts=2e-2, routing=0.8)
    roles = MappingProxyType({"lora_a": "experts", "lora_b": "experts"})
    no_lora = None
    examples = (AdapterSpec("mhr", rank=2, experts=5, splits=3),)

    def __init__(self, spec: AdapterSpec, target: TargetModule) -> None:
        super().__init__(spec, target)
        splits = self.splits(spec)
        for side, size in (("d_in", target.d_in), ("d_out", target.d_out)):
            if size % splits:
                raise SpecError(
                    f"{target.name}: {side} {size} does not divide into {splits} splits"
                )
        self.lora_a = nn.Parameter(
            torch.empty(splits, spec.experts, target.d_in // splits, spec.rank)
        )
        self.lora_b = nn.Parameter(
            torch.empty(splits, spec.experts, spec.rank, target.d_out // splits)
        )

    @classmethod
    def splits(cls, spec: AdapterSpec) -> int:
        return spec.splits

    def scale(self) -> float:
        """The factor of the delta; the papers' code divides by the rank."""
        return 1 / self.spec.rank

    def reset(self, generator: torch.Generator) -> None:
        initial_side(self.lora_a, self.target.d_in, generator)
        nn.init.zeros_(self.lora_b)

    def operands(self, dtype: torch.dtype) -> Operands:
        a = self.lora_a.transpose(2, 3).flatten(1, 2)  # [S, E*r, d_in/S]
        b = self.lora_b.flatten(1, 2) * self.scale()  # [S, E*r, d_out/S]
        return a.to(dtype).contiguous(), b.to(dtype)


class PolyExperts(MhrExperts):
    """Poly: `A_t = sum_e w_te A_e`, `B_t = sum_e w_te B_e`, `delta = B_t A_t x / r`."""

    method = "poly"
    uses = frozenset({"rank", "experts", "granularity"})
    rates = LearningRates(experts=2e-2, routing=0.8)
    examples = (AdapterSpec("poly", rank=3, experts=5),)


class LoraExperts(PolyExperts):
    """LoRA: `delta = B A x * alpha / r`; alpha is 1 where it is not given (the papers' code)."""

    method = "lora"
    uses = frozenset({"rank", "alpha"})
    rates = LearningRates(experts=2e-2)
    examples = (AdapterSpec("lora", rank=3, alpha=2.0),)

    @classmethod
    def routing_size(cls, spec: AdapterSpec) -> int:
        return 0

    @classmethod
    def route(cls, spec: AdapterSpec, logits: Tensor, *, sample: bool = False) -> Tensor:
        return Experts.route(spec, logits)

    def scale(self) -> float:
        return (1.0 if self.spec.alpha is None else self.spec.alpha) / self.spec.rank
