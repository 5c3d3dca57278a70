"""T-REX: rank-one experts on both sides of the adapter, mixed and matched per token and task."""

from __future__ import annotations

from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyrex.adapters.errors import SpecError
from polyrex.adapters.spec import AdapterSpec, TargetModule
from polyrex.kernels.modules import TokenGates
from polyrex.kernels.routing import ModuleRouting

from .composed import LowRank
from .protocol import Experts, LearningRates, Operands, Space
from .rank_space import initial_side

TOKEN_COEFFICIENT = 32
TASK_COEFFICIENT = 4
SIGMOID_SCALE = 100


class TrexExperts(Experts):
    """T-REX: `delta = sigmoid(100 gate_raw) * B (G^T (A x))`, A `[I, d_in]`, B `[d_out, J]`.

    G holds a gate for each of the I*J pairs, `g = 32 omega softmax(R x) + 4 (1 - omega) c`, with
    `omega = sigmoid(100 omega_raw)`, R the module's token router `[I*J, d_in]`, and c the intuition
    of the task: its router. With `intuition = K`, the router holds K cosines with centroids of
    texts, and a map that all modules share makes c of them (adapters/intuition.py). Three forms:
    `mix` as above; `diagonal`, I = J and only the I gates on the diagonal; `static`, omega = 0 and
    G itself free for each module and task: `delta = B G^T A x`, with neither token router nor
    scalar gates.

    A row of the routing table is c behind a switch that is 1; for `static` it is G.
    """

    method = "trex"
    uses = frozenset({"rank", "rank_out", "form", "granularity", "intuition"})
    rates = LearningRates(experts=3e-3, token_routers=3e-3)
    roles = MappingProxyType(
        {
            "lora_a": "experts",
            "lora_b": "experts",
            "token_router": "token_routers",
            "omega_raw": "gates",
            "gate_raw": "gates",
        }
    )
    no_lora = None  # of the static form; `compose` refuses the others
    examples = (
        AdapterSpec("trex", rank=3, rank_out=5),
        AdapterSpec("trex", rank=3, form="diagonal"),
        AdapterSpec("trex", rank=3, rank_out=5, form="static"),
    )

    def __init__(self, spec: AdapterSpec, target: TargetModule) -> None:
        super().__init__(spec, target)
        self.lora_a = nn.Parameter(torch.empty(spec.rank, target.d_in))
        self.lora_b = nn.Parameter(torch.empty(target.d_out, spec.outer_rank))
        if spec.form != "static":
            self.token_router = nn.Parameter(torch.empty(spec.gates, target.d_in))
            self.omega_raw = nn.Parameter(torch.empty(()))
            self.gate_raw = nn.Parameter(torch.empty(()))

    @property
    def space(self) -> Space:
        return "pair" if self.spec.form == "static" else "token"

    @property
    def routes_by_token(self) -> bool:
        return self.spec.form != "static"

    @classmethod
    def check(cls, spec: AdapterSpec) -> None:
        super().check(spec)
        if spec.intuition and (spec.form == "static" or spec.granularity != "model"):
            raise SpecError(
                "trex: intuition needs granularity=model, and form mix or diagonal; "
                f"got {spec.granularity} and {spec.form}"
            )
        if spec.form == "diagonal" and spec.outer_rank != spec.rank:
            raise SpecError(
                f"trex: form=diagonal needs rank_out equal to rank {spec.rank}, got {spec.rank_out}"
            )

    @classmethod
    def routing_size(cls, spec: AdapterSpec) -> int:
        return spec.intuition or spec.gates

    @classmethod
    def table_size(cls, spec: AdapterSpec) -> int:
        return spec.gates + (spec.form != "static")

    @classmethod
    def initial_logits(cls, spec: AdapterSpec, generator: torch.Generator) -> Tensor:
        """A fresh intuition, near 0; for `static` a G near the identity, as B begins at 0."""
        noise = super().initial_logits(spec, generator)
        if spec.form != "static":
            return noise
        return torch.eye(spec.rank, spec.outer_rank).flatten() + 100 * noise

    @classmethod
    def route(cls, spec: AdapterSpec, logits: Tensor, *, sample: bool = False) -> Tensor:
        if spec.form == "static":
            return logits
        return torch.cat((super().route(spec, logits), logits), -1)

    def reset(self, generator: torch.Generator) -> None:
        initial_side(self.lora_a, self.target.d_in, generator)
        nn.init.zeros_(self.lora_b)
        if self.spec.form != "static":
            initial_side(self.token_router, self.target.d_in, generator)
            nn.init.zeros_(self.omega_raw)
            nn.init.zeros_(self.gate_raw)

    def operands(self, dtype: torch.dtype) -> Operands:
        a = self.lora_a.to(dtype)
        if self.spec.form == "static":
            return a, self.lora_b.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        omega = torch.sigmoid(SIGMOID_SCALE * self.omega_raw).to(wide)
        b = self.lora_b * torch.sigmoid(SIGMOID_SCALE * self.gate_raw)
        token, task = TOKEN_COEFFICIENT * omega, TASK_COEFFICIENT * (1 - omega)
        return a, b.to(dtype), self.token_router.to(wide), token, task

    def sides(self, operands: Operands) -> tuple[Tensor, Tensor]:
        a, b, *_ = operands
        return a.unsqueeze(0), b.t().unsqueeze(0)

    def token_gates(self, operands: Operands) -> TokenGates:
        _, _, router, token, task = operands
        return TokenGates(router, token.item(), task.item(), pairs=self.spec.form == "mix")

    def compose(self, operands: Operands, weights: Tensor, dtype: torch.dtype) -> LowRank:
        """Of the static form: `A` as it is, and `G_t B^T`."""
        if self.spec.form != "static":
            return super().compose(operands, weights, dtype)  # type: ignore[return-value]
        a, b = operands
        cores = weights.view(len(weights), len(a), -1).to(b.dtype)
        return LowRank(a.to(dtype).expand(len(weights), -1, -1), (cores @ b.T).to(dtype))

    def delta(self, operands: Operands, x: Tensor, routing: ModuleRouting) -> Tensor:
        a, b, *gates = operands
        hidden = F.linear(x, a)  # [T, I]
        pairs = routing.token_weights if self.spec.form == "static" else _gates(gates, x, routing)
        if self.spec.form == "diagonal":
            mixed = hidden * pairs
        else:
            by_side = pairs.view(len(x), len(a), b.shape[1])
            mixed = torch.bmm(hidden.unsqueeze(1), by_side).squeeze(1)
        return F.linear(mixed, b)


def _gates(operands: list[Tensor], x: Tensor, routing: ModuleRouting) -> Tensor:
    """g [T, I*J] in the dtype of x, computed in float32; 0 where the switch is 0."""
    token_router, token, task = operands
    row = routing.weights.to(token.dtype).index_select(0, routing.rows)
    by_token = torch.softmax(F.linear(x.to(token.dtype), token_router), -1)
    return (token * by_token * row[:, :1] + task * row[:, 1:]).to(x.dtype)
