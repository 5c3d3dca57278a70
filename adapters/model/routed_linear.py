"""The layer that adds a routed adapter to a frozen linear layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyrex.adapters.methods.composed import Composed
from polyrex.adapters.methods.protocol import Experts, Operands
from polyrex.adapters.serving.serving import ServedLayer, frozen_operands
from polyrex.kernels.routing import StepRouting


@dataclass
class RoutingContext:
    """Where the layers of one model find the routing of the current forward pass.

    Whoever calls the model sets `step` before the call; None means the base model alone.
    """

    step: StepRouting | None = None


class RoutedLinear(nn.Module):
    """y = W x + b + delta(x; routing of x's token), with W and b frozen."""

    def __init__(
        self, base: nn.Linear, experts: Experts, index: int, context: RoutingContext
    ) -> None:
        super().__init__()
        self.base = base
        self.experts = experts
        self.index = index
        self.context = context
        self.operands: Operands | None = None
        """What whoever runs the model made of the experts; None: made in every forward pass."""
        self.composed: Composed | None = None
        """The adapters of a batch's rows, or one for all, where whoever runs the model built them:
        they are then what is added, and the step's routing is not read."""
        self.served: ServedLayer | None = None
        """Set by an engine: the adapter frozen, in the form that is fastest to run."""

    @property
    def weight(self) -> Tensor:
        """The frozen weight: some models look at its dtype before they call the layer."""
        return self.base.weight

    def prepare(self, dtype: torch.dtype) -> None:
        """Derive the operands once, where the experts stay as they are.

        Raises TensorMismatch where `dtype` cannot hold them.
        """
        self.operands = frozen_operands(self.experts, dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        step = self.context.step
        if step is None:
            return y
        if self.composed is not None:
            return y + self.composed.delta(x)[..., : y.shape[-1]]
        flat = x.reshape(-1, x.shape[-1])
        if self.served is not None:
            self.served.add_(y.view(-1, y.shape[-1]), flat, step)
            return y
        operands = self.operands or self.experts.operands(x.dtype)
        routing = step.spread(len(flat)).module(self.index)
        return y + self.experts.delta(operands, flat, routing).view(y.shape)
