"""The layer that adds an adapter to a frozen linear layer, and the things that it may add."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from polyrex.adapters.methods.composed import Composed
from polyrex.adapters.methods.protocol import Experts, Operands
from polyrex.adapters.serving.layers import ServedLayer, StepContext
from polyrex.kernels.routing import StepRouting


class Addition(Protocol):
    """The one thing that a routed layer adds to the output of its frozen layer."""

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y + delta(x), for y [..., d_out] and x [..., d_in]; y may be changed in place."""


class RoutedLinear(nn.Module):
    """y = W x + b + delta(x), with W and b frozen.

    Whoever runs the model sets `added`; None means the base model alone.
    """

    def __init__(self, base: nn.Linear, experts: Experts, index: int) -> None:
        super().__init__()
        self.base = base
        self.experts = experts
        self.index = index
        self.added: Addition | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen weight: some models look at its dtype before they call the layer."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y if self.added is None else self.added.add_to(y, x)


@dataclass(frozen=True)
class AddByStep:
    """The method's own `delta`, for tokens of any mix of tasks."""

    experts: Experts
    operands: Operands
    step: StepRouting
    index: int

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        routing = self.step.spread(len(flat)).module(self.index)
        return y + self.experts.delta(self.operands, flat, routing).view(y.shape)


@dataclass(frozen=True)
class AddComposed:
    """The adapters of a batch's rows, multiplied out; or one adapter for all rows."""

    composed: Composed

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        return y + self.composed.delta(x)[..., : y.shape[-1]]


@dataclass(frozen=True)
class AddServed:
    """The frozen adapters of an engine, routed by the step that the engine has set."""

    layer: ServedLayer
    context: StepContext

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        step = self.context.step
        if step is not None:
            self.layer.add_(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), step)
        return y
