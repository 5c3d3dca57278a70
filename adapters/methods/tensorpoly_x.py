"""TensorPoly-X: the adapter's whole matrix as a tensor train."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyrex.adapters.spec import AdapterSpec, TargetModule
from polyrex.kernels.kronecker import Kronecker
from polyrex.kernels.leaf_size import leaf_size
from polyrex.kernels.routing import ModuleRouting

from .protocol import Experts, LearningRates, Operands, Space, normalised_gates


class TensorPolyXExperts(Experts):
    """TensorPoly-X: `delta = gate * x W_t / r`, with W_t a tensor train of N cores.

    Core n is `[q, E, q, E]`, the last one `[q, E, q, m]`, with `q = ceil(d_in ** (1/N))` and
    `m = ceil(d_out / d_in)`: axes are a digit of the input, the left bond, a digit of the output,
    the right bond. `W_t[i_1..i_N, j_1..j_N m] = sum over bonds of prod_n w_t,n,e_n core_n[i_n, e_n,
    j_n, e_(n+1)]`, the first bond summed over as well, cut to `[d_in, d_out]`. `delta` never builds
    W_t: tokens are contracted with one core after the other, and weighted by their routing in
    between.
    """

    method = "tensorpoly-x"
    uses = frozenset({"rank", "experts", "order", "granularity"})
    rates = LearningRates(experts=0.3, gates=0.03, routing=0.8)
    roles = MappingProxyType({"tensor_weights": "experts", "gate": "gates"})
    no_lora = "its adapter is a tensor train of full rank, not a LoRA"
    examples = (
        AdapterSpec("tensorpoly-x", rank=3, experts=3),
        AdapterSpec("tensorpoly-x", rank=3, experts=2, order=3),
    )

    def __init__(self, spec: AdapterSpec, target: TargetModule) -> None:
        super().__init__(spec, target)
        q, experts = leaf_size(target.d_in, spec.order), spec.experts
        last = math.ceil(target.d_out / target.d_in)
        bonds = [experts] * (spec.order - 1) + [last]
        self.tensor_weights = nn.ParameterList(torch.empty(q, experts, q, bond) for bond in bonds)
        self.gate = nn.Parameter(torch.empty(()))

    @property
    def space(self) -> Space:
        return "bond"

    @classmethod
    def routing_size(cls, spec: AdapterSpec) -> int:
        return spec.order * spec.experts

    @classmethod
    def route(cls, spec: AdapterSpec, logits: Tensor, *, sample: bool = False) -> Tensor:
        return normalised_gates(logits, spec.experts, sample=sample)

    def reset(self, generator: torch.Generator) -> None:
        # Under uniform routing the entries of W_t then have variance 1.
        for core in self.tensor_weights:
            nn.init.normal_(core, std=math.sqrt(self.spec.experts), generator=generator)
        nn.init.zeros_(self.gate)

    def load_released(self, cores: Sequence[Tensor]) -> None:
        """Take the cores of the released code, which stores two: the first N-1 share one tensor."""
        shared, last = cores
        with torch.no_grad():
            for core in self.tensor_weights[:-1]:
                core.copy_(shared)
            self.tensor_weights[-1].copy_(last)

    def operands(self, dtype: torch.dtype) -> Operands:
        # [left bond * input digit, output digit * right bond]: what one product contracts
        cores = [core.transpose(0, 1).flatten(0, 1).flatten(1) for core in self.tensor_weights]
        cores[-1] = cores[-1] * (self.gate / self.spec.rank)
        return tuple(core.to(dtype).contiguous() for core in cores)

    def task_state(self, operands: Operands, weights: Tensor) -> Kronecker:
        """D tasks' W_t, from their rows of routing weights [D, W], cut at the bond in the middle.

        The cores before the bond, and those behind it, are multiplied out; of what they give for
        outputs beyond d_out, nothing is kept.
        """
        order, experts = len(operands), self.spec.experts
        q = len(operands[0]) // experts
        by_order = weights.view(-1, order, experts, 1, 1, 1)
        cores = [core.view(experts, q, q, -1) * by_order[:, n] for n, core in enumerate(operands)]
        middle = order // 2
        ones = weights.new_ones(len(weights), 1, 1, 1, experts)  # sums over the first bond
        first = reduce(_joined, cores[:middle], ones).squeeze(1).permute(0, 3, 1, 2)
        second = reduce(_joined, cores[middle:]).flatten(3)
        rows = math.ceil(self.target.d_out / second.shape[3])
        return Kronecker(first[..., :rows], second)

    def compose(self, operands: Operands, weights: Tensor, dtype: torch.dtype) -> Kronecker:
        factors = self.task_state(operands, weights.to(operands[0].dtype))
        return Kronecker(factors.first.to(dtype), factors.second.to(dtype))

    def delta(self, operands: Operands, x: Tensor, routing: ModuleRouting) -> Tensor:
        tokens, order, experts = len(x), len(operands), self.spec.experts
        q = len(operands[0]) // experts
        weights = routing.token_weights.view(tokens, order, 1, experts, 1)
        rest, done = q**order, 1  # input digits still there, output digits already there
        state = F.pad(x, (0, rest - x.shape[-1])).view(tokens, done, 1, rest)
        state = state.expand(tokens, done, experts, rest)
        for n, core in enumerate(operands):
            rest //= q
            weighted = (state * weights[:, n]).reshape(tokens, done, experts * q, rest)
            product = torch.matmul(weighted.transpose(-1, -2), core)  # [T, done, rest, q * bond]
            state = product.view(tokens, done, rest, q, core.shape[1] // q).permute(0, 1, 3, 4, 2)
            done *= q
            state = state.reshape(tokens, done, core.shape[1] // q, rest)
        return state.flatten(1)[:, : self.target.d_out]


def _joined(left: Tensor, right: Tensor) -> Tensor:
    """Contract the bond between two cores, [D, a, i, j, e] and [D, e, k, l, b].

    The result is a core again, [D, a, i * k, j * l, b].
    """
    return torch.einsum("daije,deklb->daikjlb", left, right).flatten(4, 5).flatten(2, 3)
