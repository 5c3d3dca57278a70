"""The layer that adds a routed adapter to a frozen linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyrex.kernels.rank_space import shrink_and_spread
from polyrex.kernels.routing import StepRouting

from .errors import TensorMismatch
from .experts import Experts, Operands


@dataclass
class RoutingContext:
    """Where the layers of one model find the routing of the current forward pass.

    Whoever calls the model sets `step` before the call; None means the base model alone.
    """

    step: StepRouting | None = None


class SharedInput:
    """Layers that are given the same input, and shrink it in one product for all of them.

    Which layers those are is learned, not assumed: candidates start together, and one that is
    handed another tensor than the first of them was leaves for good (`o_proj`, of an attention).
    """

    def __init__(self, sides: Mapping[int, Tensor]) -> None:
        """`sides`: by a layer's index, in the order of the forward pass, its A side [E*r, d_in]."""
        self._sides = dict(sides)
        self._join()

    def _join(self) -> None:
        first = next(iter(self._sides.values()))
        # Stored the other way round: see shrink_and_spread.
        self._a = torch.cat(list(self._sides.values())).t().contiguous().t()
        self._indices = torch.tensor(list(self._sides), device=first.device)
        self._x: Tensor | None = None
        self._spread: tuple[Tensor, ...] = ()

    def serves(self, index: int, x: Tensor) -> bool:
        """Whether layer `index` reads what the first of them read in this forward pass."""
        return index == next(iter(self._sides)) or x is self._x

    def split_off(self, index: int) -> SharedInput:
        """Let layer `index` go; returns what it shares with nobody from now on."""
        side = self._sides.pop(index)
        self._join()
        return SharedInput({index: side})

    def spread(self, index: int, x: Tensor, step: StepRouting) -> Tensor:
        """What layer `index` applies its B side to, [T, E*r]; only where `serves` says so."""
        place = list(self._sides).index(index)
        if place == 0:
            weights = step.by_token.index_select(1, self._indices)
            spread = shrink_and_spread(x.reshape(-1, x.shape[-1]), self._a, weights)
            # x is kept until the next one: as long as it lives, `is` cannot be fooled.
            self._x, self._spread = x, spread.unbind(1)
        return self._spread[place]


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
        self.shared: SharedInput | None = None
        """Where serving finds this layer's share of a product with its neighbours'."""

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
        if self.shared is not None and step.run == 1:
            if not self.shared.serves(self.index, x):
                self.shared = self.shared.split_off(self.index)
            spread = self.shared.spread(self.index, x, step)
            # In place: the sum costs nothing extra inside the product.
            return y.view(-1, y.shape[-1]).addmm_(spread, operands[1][0]).view(y.shape)
        flat = x.reshape(-1, x.shape[-1])
        return y + self.experts.delta(operands, flat, step.module(self.index)).view(y.shape)
