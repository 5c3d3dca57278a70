"""MoLoRA and SiRA: low-rank experts that each token chooses for itself."""

from __future__ import annotations

from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyrex.adapters.errors import SpecError
from polyrex.adapters.spec import AdapterSpec, TargetModule
from polyrex.kernels.modules import TokenGates
from polyrex.kernels.routing import ModuleRouting

from .protocol import Experts, LearningRates, Operands, Space
from .rank_space import initial_side


class MoloraExperts(Experts):
    """MoLoRA: `delta = B (gates * A x)`, A `[E*r, d_in]`, B `[d_out, E*r]`, E experts of rank r.

    `gates = softmax(R x)` with R the module's token router `[E, d_in]`, tiled over the E*r rank
    rows: row k uses expert `k mod E`. There is no task in it; a row of the routing table holds
    the switch of the adapter.
    """

    method = "molora"
    uses = frozenset({"rank", "experts"})
    rates = LearningRates(experts=1e-2, token_routers=1e-2)
    roles = MappingProxyType(
        {"lora_a": "experts", "lora_b": "experts", "token_router": "token_routers"}
    )
    no_lora = "every token has its own adapter, a task has none"
    examples = (AdapterSpec("molora", rank=2, experts=5),)

    def __init__(self, spec: AdapterSpec, target: TargetModule) -> None:
        super().__init__(spec, target)
        self.lora_a = nn.Parameter(torch.empty(spec.experts * spec.rank, target.d_in))
        self.lora_b = nn.Parameter(torch.empty(target.d_out, spec.experts * spec.rank))
        self.token_router = nn.Parameter(torch.empty(spec.experts, target.d_in))

    @property
    def space(self) -> Space:
        return "token"

    @property
    def routes_by_token(self) -> bool:
        return True

    def reset(self, generator: torch.Generator) -> None:
        initial_side(self.lora_a, self.target.d_in, generator)
        initial_side(self.token_router, self.target.d_in, generator)
        nn.init.zeros_(self.lora_b)

    def operands(self, dtype: torch.dtype) -> Operands:
        wide = torch.promote_types(dtype, torch.float32)
        return self.lora_a.to(dtype), self.lora_b.to(dtype), self.token_router.to(wide)

    def gates(self, logits: Tensor) -> Tensor:
        """The gate of each expert, [T, E], from a token's router logits."""
        return torch.softmax(logits, -1)

    def sides(self, operands: Operands) -> tuple[Tensor, Tensor]:
        a, b, *_ = operands
        return a.unsqueeze(0), b.t().unsqueeze(0)

    def token_gates(self, operands: Operands) -> TokenGates:
        return TokenGates(operands[2])

    def delta(self, operands: Operands, x: Tensor, routing: ModuleRouting) -> Tensor:
        a, b, token_router = operands
        gates = self.gates(F.linear(x.to(token_router.dtype), token_router)).to(x.dtype)
        rows = F.linear(x, a).view(len(x), self.spec.rank, self.spec.experts)  # [T, r, E]
        gated = rows * (gates * routing.token_weights).unsqueeze(1)
        return F.linear(gated.flatten(1), b)


class SiraExperts(MoloraExperts):
    """SiRA: MoLoRA that keeps the `top_k` largest gates of a token (6 by default), as they are."""

    method = "sira"
    uses = frozenset({"rank", "experts", "top_k"})
    examples = (AdapterSpec("sira", rank=2, experts=7),)

    @classmethod
    def check(cls, spec: AdapterSpec) -> None:
        super().check(spec)
        if _top_k(spec) > spec.experts:
            raise SpecError(
                f"sira: top_k must be at most experts, {spec.experts}, got {_top_k(spec)}"
            )

    def token_gates(self, operands: Operands) -> TokenGates:
        return TokenGates(operands[2], top_k=_top_k(self.spec))

    def gates(self, logits: Tensor) -> Tensor:
        gates = super().gates(logits)
        # stable, as the compiled operator is: of equal gates the first are kept
        ordered, experts = gates.sort(dim=-1, descending=True, stable=True)
        most = _top_k(self.spec)
        return torch.zeros_like(gates).scatter(-1, experts[..., :most], ordered[..., :most])


def _top_k(spec: AdapterSpec) -> int:
    return 6 if spec.top_k is None else spec.top_k
