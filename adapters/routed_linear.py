"""The layer that adds a routed adapter to a frozen linear layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyrex.kernels.routing import StepRouting

from .errors import TensorMismatch
from .experts import Experts, Operands


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

    def prepare(self, dtype: torch.dtype) -> None:
        """Derive the operands once, for serving; training derives them in every step.

        Raises TensorMismatch where `dtype` cannot hold them.
        """
        with torch.no_grad():
            operands = tuple(t.contiguous() for t in self.experts.operands(dtype))
        if not all(torch.isfinite(operand).all() for operand in operands):
            name = self.experts.target.name
            raise TensorMismatch(f"target module {name}: the experts are not finite in {dtype}")
        self.operands = operands

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        step = self.context.step
        if step is None:
            return y
        operands = self.operands or self.experts.operands(x.dtype)
        flat = x.reshape(-1, x.shape[-1])
        return y + self.experts.delta(operands, flat, step.module(self.index)).view(y.shape)
