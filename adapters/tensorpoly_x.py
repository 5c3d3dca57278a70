"""TensorPoly-X: the adapter's whole matrix as a tensor train."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyrex.kernels.routing import ModuleRouting

from .experts import Experts, Operands, normalised_gates
from .spec import AdapterSpec, TargetModule
from .tensor_product import leaf_size


class TensorPolyXExperts(Experts):
    """TensorPoly-X: `delta = gate * x W_t / r`, with W_t a tensor train of N cores.

    Core n is `[q, E, q, E]`, the last one `[q, E, q, m]`, with `q = ceil(d_in ** (1/N))` and
    `m = ceil(d_out / d_in)`: axes are a digit of the input, the left bond, a digit of the output,
    the right bond. `W_t[i_1..i_N, j_1..j_N m] = sum over bonds of prod_n w_t,n,e_n core_n[i_n, e_n,
    j_n, e_(n+1)]`, the first bond summed over as well, cut to `[d_in, d_out]`. W_t is never built:
    tokens are contracted with one core after the other, and weighted by their routing in between.
    Only the first core, whose left bond no token reads, is weighted once a task.
    """

    method = "tensorpoly-x"
    uses = frozenset({"rank", "experts", "order", "granularity"})

    def __init__(self, spec: AdapterSpec, target: TargetModule) -> None:
        super().__init__(spec, target)
        q, experts = leaf_size(target.d_in, spec.order), spec.experts
        last = math.ceil(target.d_out / target.d_in)
        bonds = [experts] * (spec.order - 1) + [last]
        self.tensor_weights = nn.ParameterList(torch.empty(q, experts, q, bond) for bond in bonds)
        self.gate = nn.Parameter(torch.empty(()))

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
        # [left bond * output digit, input digit * right bond], the last [bond * output, input]
        cores = [core.permute(1, 2, 0, 3).flatten(2) for core in self.tensor_weights[:-1]]
        last = self.tensor_weights[-1] * (self.gate / self.spec.rank)
        cores.append(last.permute(1, 2, 3, 0).flatten(1, 2))
        return tuple(core.flatten(0, 1).to(dtype).contiguous() for core in cores)

    def delta(self, operands: Operands, x: Tensor, routing: ModuleRouting) -> Tensor:
        *cores, last = operands
        order, tokens = len(operands), len(x)
        experts, q = self.spec.experts, last.shape[1]
        weights = routing.token_weights.view(tokens, order, 1, experts, 1)
        done, left = len(last) // experts, q ** (order - 1)  # output digits there, input's left
        digits = F.pad(x, (0, q * left - x.shape[-1])).view(tokens, left, q)
        # From the last digit to the first, so that what comes out lies as the next product wants
        # it: [T, input digits left, bond, output digits there].
        state = F.linear(digits, last).view(tokens, left, experts, done)
        for n in range(order - 2, 0, -1):
            left //= q
            weighted = (state * weights[:, n + 1]).view(tokens, left, q * experts, done)
            done *= q
            state = torch.matmul(cores[n], weighted).view(tokens, left, experts, done)
        if cores:
            first = self._first_core(cores[0], x, routing)
            state = torch.matmul(first, state.view(tokens, q * experts, done))
        else:
            state = (state * weights[:, 0]).sum(2)
        return state.flatten(1)[:, : self.target.d_out]

    def _first_core(self, core: Tensor, x: Tensor, routing: ModuleRouting) -> Tensor:
        """[T, q, q * E]: the first core of each token's task, with both its bonds weighted."""
        experts, q = self.spec.experts, len(core) // self.spec.experts
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = routing.weights.to(wide)
        left, right = weights[:, :experts], weights[:, None, None, experts : 2 * experts]
        summed = (left @ core.to(wide).view(experts, -1)).view(-1, q, q, experts)
        by_task = (summed * right).to(x.dtype).flatten(2)
        return by_task if len(by_task) == 1 else by_task[routing.rows]
