"""The protocol that every adapter method implements, for one target module."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from polyrex.adapters.errors import SpecError
from polyrex.adapters.spec import AdapterSpec, TargetModule
from polyrex.kernels.cpu.token_gates import TokenGates
from polyrex.kernels.routing import ModuleRouting

from .composed import Composed

Operands = tuple[Tensor, ...]

Space = Literal["rank", "pair", "token", "leaf", "bond"]
"""What routing weights mix: experts' A and B sides, pairs of an A and a B side, with what tokens
choose for themselves, leaves, or the bonds of a tensor train."""


class Experts(nn.Module):
    """The latent experts of one target module: parameters, and the formula that applies them.

    The formula is cut up, so that training and serving share it and neither repeats work: `route`
    turns a router's logits into routing weights (once per task), `operands` turns parameters into
    the tensors that the products read (once per load when serving, once per step when training),
    and `delta` does what depends on tokens. Where tokens do not choose, `compose` multiplies out
    whole tasks from operands and routing weights.
    """

    method: ClassVar[str]
    uses: ClassVar[frozenset[str]]
    """The fields of AdapterSpec that the method reads, beside `method`."""

    def __init__(self, spec: AdapterSpec, target: TargetModule) -> None:
        super().__init__()
        self.spec = spec
        self.target = target

    @property
    @abstractmethod
    def space(self) -> Space:
        """Where routing happens, which chooses the kernel (adapters/serving.py)."""

    @property
    def routes_by_token(self) -> bool:
        """Whether tokens choose among the experts by their values, so that delta is not linear."""
        return False

    @classmethod
    def check(cls, spec: AdapterSpec) -> None:
        """Refuse hyperparameters that the method would silently ignore, or cannot take.

        Raises SpecError naming the field, what was expected and what came.
        """
        default = AdapterSpec(spec.method)
        for name in vars(default):
            if name not in cls.uses | {"method"} and getattr(spec, name) != getattr(default, name):
                raise SpecError(
                    f"{spec.method} has no {name} (got {getattr(spec, name)!r}); "
                    f"it takes {', '.join(sorted(cls.uses))}"
                )

    @classmethod
    def routing_size(cls, spec: AdapterSpec) -> int:
        """R: routing logits that a router holds for one group of modules; 0 for none."""
        return 0

    @classmethod
    def table_size(cls, spec: AdapterSpec) -> int:
        """W: routing weights that a row of the routing table holds for one module."""
        return cls.routing_size(spec) or 1

    @classmethod
    def initial_logits(cls, spec: AdapterSpec, generator: torch.Generator) -> Tensor:
        """A fresh router's logits [R]."""
        return torch.empty(cls.routing_size(spec)).uniform_(-1e-3, 1e-3, generator=generator)

    @classmethod
    def route(cls, spec: AdapterSpec, logits: Tensor, *, sample: bool = False) -> Tensor:
        """Routing weights [..., W] of a router's logits [..., R], float32.

        `sample` draws from the relaxed Bernoulli first, where the method trains that way.
        A method without routing logits has one weight, 1: the switch of its adapter.
        """
        return logits.new_ones(*logits.shape[:-1], 1)

    @abstractmethod
    def reset(self, generator: torch.Generator) -> None:
        """Draw initial values; afterwards delta is 0 for every input."""

    @abstractmethod
    def operands(self, dtype: torch.dtype) -> Operands:
        """What `delta` reads, derived from the parameters alone, differentiably."""

    def forward(self, dtype: torch.dtype) -> Operands:
        """`operands`, under the name by which torch.func calls a module on other parameters."""
        return self.operands(dtype)

    def token_gates(self, operands: Operands) -> TokenGates:
        """How tokens choose, for methods in token space."""
        raise NotImplementedError(f"{self.method}'s tokens do not choose")

    def compose(self, operands: Operands, weights: Tensor, dtype: torch.dtype) -> Composed:
        """The adapters of D tasks in `dtype`, from their rows of routing weights [D, W].

        Differentiable in both. Raises SpecError where each token has an adapter of its own.
        """
        raise SpecError(f"{self.method}: every token has its own adapter, a task has none")

    @abstractmethod
    def delta(self, operands: Operands, x: Tensor, routing: ModuleRouting) -> Tensor:
        """The adapter's contribution [T, d_out] for tokens x [T, d_in], in the dtype of x."""


def normalised_gates(logits: Tensor, experts: int, *, sample: bool) -> Tensor:
    """w = sigmoid(Z) / (sum_e sigmoid(Z) + 1e-12), over each run of `experts` logits.

    logits [..., G * experts], any number G of independent choices (splits or orders); the result
    has the same shape. With `sample`, Z first passes a relaxed Bernoulli of temperature 1: logistic
    noise is added to it (TensorPoly, section 3.1; Poly, equation 3).
    """
    if sample:
        uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
        logits = logits + torch.logit(uniform)
    gates = torch.sigmoid(logits).view(*logits.shape[:-1], -1, experts)
    normalised = gates / (gates.sum(-1, keepdim=True) + 1e-12)
    return normalised.view(logits.shape)
