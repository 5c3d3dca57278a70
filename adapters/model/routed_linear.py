"""The layer that adds an adapter to a frozen linear layer, and the things that it may add."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from polyrex.adapters.methods.composed import Composed
from polyrex.adapters.methods.protocol import Experts, Operands
from polyrex.adapters.serving.layers import ServedLayer, StepContext, TwoPartLayer
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
        return product_and_added(self.base, x, self.added)


def product_and_added(
    product: Callable[[Tensor], Tensor], x: Tensor, added: Addition | None
) -> Tensor:
    """What a layer with a frozen product makes of x, with the one thing that is added."""
    if isinstance(added, AddBeside) and torch.cuda.is_current_stream_capturing():
        return added.beside(product, x)
    y = product(x)
    return y if added is None else added.add_to(y, x)


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


@dataclass(frozen=True)
class AddBeside(AddServed):
    """The same on a GPU, where A sides can run on a stream of their own, beside the product.

    Only a CUDA graph gains by it: without one, to launch it all takes longer than the work.
    """

    layer: TwoPartLayer
    stream: torch.cuda.Stream

    def beside(self, product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """product(x) + delta(x), with both ways through the layer in the graph."""
        step, flat = self.context.step, x.reshape(-1, x.shape[-1])
        if step is None:
            return product(x)
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            hidden = self.layer.shrink(flat, step)
        y = product(x)
        current.wait_stream(self.stream)
        self.layer.expand_(y.view(-1, y.shape[-1]), hidden, step)
        return y


def add_served(
    layer: ServedLayer, context: StepContext, beside: torch.cuda.Stream | None
) -> AddServed:
    """What adds a served layer, on another stream if it can."""
    if beside is not None and isinstance(layer, TwoPartLayer):
        return AddBeside(layer, context, beside)
    return AddServed(layer, context)
