"""The protocol that every adapter method implements, for one target module."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from polyrex.adapters.errors import SpecError
from polyrex.adapters.spec import AdapterSpec, TargetModule
from polyrex.kernels.modules import TaskState, TokenGates
from polyrex.kernels.routing import ModuleRouting

from .composed import Composed

Operands = tuple[Tensor, ...]

Space = Literal["rank", "pair", "token", "leaf", "bond"]
"""The things that routing weights mix: A and B sides of experts (rank), pairs of an A and a B side
(pair), gates that tokens compute (token), leaves (leaf), or bonds of a tensor train (bond)."""


Role = Literal["experts", "gates", "token_routers"]
"""The role of a parameter: latent experts, scalar gates, or routers by which tokens choose."""


@dataclass(frozen=True)
class LearningRates:
    """Peak learning rates by role. A step of AdamW moves every number by about its learning rate,
    and the roles live on different scales."""

    experts: float = 2e-3
    """Learning rate of the experts."""
    gates: float = 3e-4
    """Learning rate of scalar gates."""
    routing: float = 5e-2
    """Learning rate of the tasks' routing logits."""
    token_routers: float = 2e-3
    """Learning rate of the routers by which tokens choose."""

    def of(self, group: str) -> float:
        """The rate of a parameter group, by its name."""
        rate: float = getattr(self, group)
        return rate


class Experts(nn.Module):
    """The latent experts of one target module: parameters, and the formula that applies them.

    The formula has three parts, which training and serving share. `route` turns a router's logits
    into routing weights, once per task. `operands` turns parameters into the tensors that the
    products read, once per load when serving and once per step when training. `delta` does what
    depends on tokens. Where tokens do not choose, `compose` multiplies out whole tasks.

    Every class variable below must be declared: the registry refuses a method that leaves one out.
    """

    method: ClassVar[str]
    """The method's name, in files and on the command line."""
    uses: ClassVar[frozenset[str]]
    """The fields of AdapterSpec that the method reads, beside `method`."""
    rates: ClassVar[LearningRates]
    """The learning rates that training starts from."""
    roles: ClassVar[Mapping[str, Role]]
    """The role of each parameter, by its name (of a ParameterList: by the list's name)."""
    no_lora: ClassVar[str | None]
    """Why a task of this method cannot be written as a LoRA; None where it can."""
    examples: ClassVar[tuple[AdapterSpec, ...]]
    """Small specs, one for each form of the method: what tests and `polyrex doctor` go through."""

    def __init__(self, spec: AdapterSpec, target: TargetModule) -> None:
        super().__init__()
        self.spec = spec
        self.target = target

    @property
    @abstractmethod
    def space(self) -> Space:
        """Where routing happens, which selects the kernels (adapters/serving/backends.py)."""

    @property
    def routes_by_token(self) -> bool:
        """Whether each token chooses among the experts by its values; delta is then not linear."""
        return False

    @classmethod
    def check(cls, spec: AdapterSpec) -> None:
        """Refuse hyperparameters that the method would ignore, or does not support.

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
        """The tensors that `delta` reads, derived differentiably from the parameters alone."""

    def forward(self, dtype: torch.dtype) -> Operands:
        """`operands`, under the name that torch.func.functional_call needs."""
        return self.operands(dtype)

    def sides(self, operands: Operands) -> tuple[Tensor, Tensor]:
        """The A sides [S, E*r, d_in/S] and B sides [S, E*r, d_out/S] that the kernels read.

        For methods in rank, pair and token space; without splits, S is 1.
        """
        a, b, *_ = operands
        return a, b

    def token_gates(self, operands: Operands) -> TokenGates:
        """How tokens choose, for methods in token space."""
        raise NotImplementedError(f"{self.method}'s tokens do not choose")

    def task_state(self, operands: Operands, weights: Tensor) -> TaskState:
        """The state that a kernel keeps for D tasks, from rows of routing weights [D, W].

        For methods in leaf and bond space; `operands` are in float32.
        """
        raise NotImplementedError(f"{self.method} keeps no state for a task")

    def compose(self, operands: Operands, weights: Tensor, dtype: torch.dtype) -> Composed:
        """The adapters of D tasks in `dtype`, from their rows of routing weights [D, W].

        Differentiable in both. Raises SpecError where each token has an adapter of its own.
        """
        raise SpecError(f"{self.method}: every token has its own adapter, a task has none")

    @classmethod
    def role(cls, parameter: str) -> Role:
        """The role of a parameter, by its name among the module's."""
        return cls.roles[parameter.partition(".")[0]]

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
        # Drawn on the CPU, so that a seed means the same noise on every device.
        drawn = torch.rand(logits.shape, dtype=logits.dtype, pin_memory=logits.is_cuda)
        uniform = drawn.to(logits.device, non_blocking=True).clamp(1e-6, 1 - 1e-6)
        logits = logits + torch.logit(uniform)
    gates = torch.sigmoid(logits).view(*logits.shape[:-1], -1, experts)
    normalised = gates / (gates.sum(-1, keepdim=True) + 1e-12)
    return normalised.view(logits.shape)
