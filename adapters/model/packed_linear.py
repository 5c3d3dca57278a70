"""Frozen linear layers that are called with the same x, run as one product.

On a GPU, three products of a few tokens take three times as long as one of all three, and so do
their adapters. q, k and v of an attention, and gate and up of an MLP, therefore share one weight,
of which their own weights are views. They stay layers of their own to the model that calls them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .routed_linear import Addition, RoutedLinear, product_and_added

_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that are called with the same x wherever one parent has them all."""


class PackedLinear:
    """y = W x + b + delta(x) of several layers side by side, with W [d_out, d_in] and b frozen.

    The first member that is called with some x computes the outputs of all, and each of the others
    takes its columns once. A member that is called with another x makes that the x of all.
    Whoever runs the model sets `added`, for all columns; None means the frozen layers alone.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        """Copies the weights of `layers`, which all have a bias, or none."""
        stops = accumulate(layer.out_features for layer in layers)
        weights: list[Tensor] = [layer.weight for layer in layers]
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        with torch.no_grad():
            self.weight = torch.cat(weights)
            self.bias = torch.cat(biases) if biases else None
        self.columns = [
            slice(stop - layer.out_features, stop)
            for layer, stop in zip(layers, stops, strict=True)
        ]
        self.added: Addition | None = None
        self._nothing = self._x = self._y = self.weight.new_empty(0)
        self._waiting: set[int] = set()  # the members that have not taken their part of y yet

    def take(self, number: int, x: Tensor) -> Tensor:
        """The outputs [..., columns] of member `number` for x [..., d_in]."""
        if x is not self._x or number not in self._waiting:
            self._y = product_and_added(self._product, x, self.added)
            self._x, self._waiting = x, set(range(len(self.columns)))
        part = self._y[..., self.columns[number]]
        self._waiting.remove(number)
        if not self._waiting:
            self._x = self._y = self._nothing
        return part

    def _product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class PackedMember(nn.Linear):
    """A layer of a PackedLinear; its weight and its bias are views of the whole's."""

    def __init__(self, packed: PackedLinear, number: int) -> None:
        columns = packed.columns[number]
        d_in, d_out = packed.weight.shape[1], columns.stop - columns.start
        super().__init__(d_in, d_out, bias=packed.bias is not None, device="meta")
        self.weight = nn.Parameter(packed.weight[columns], requires_grad=False)
        if packed.bias is not None:
            self.bias = nn.Parameter(packed.bias[columns], requires_grad=False)
        self.packed = packed
        self.columns = columns
        self._number = number

    def forward(self, x: Tensor) -> Tensor:
        return self.packed.take(self._number, x)


def pack_projections(model: nn.Module) -> None:
    """Pack the projections of every parent that has all layers of a group.

    Group by group, so that there is never a second copy of more than one. A group stays as it is
    where a layer is no plain nn.Linear (or RoutedLinear of one), d_in differ, or not all have a
    bias.
    """
    for parent in list(model.modules()):
        for names in _TOGETHER:
            places = [getattr(parent, name, None) for name in names]
            layers = [place.base if isinstance(place, RoutedLinear) else place for place in places]
            plain = [layer for layer in layers if type(layer) is nn.Linear]
            if len(plain) < len(names) or len({_kind(layer) for layer in plain}) > 1:
                continue
            packed = PackedLinear(plain)
            for number, (name, place) in enumerate(zip(names, places, strict=True)):
                member = PackedMember(packed, number)
                if isinstance(place, RoutedLinear):
                    place.base = member
                else:
                    setattr(parent, name, member)
    torch.cuda.empty_cache()  # the old weights' memory; without CUDA, this does nothing


def _kind(layer: nn.Linear) -> tuple[int, bool, torch.dtype]:
    """What the layers of one group have in common."""
    return layer.in_features, layer.bias is not None, layer.weight.dtype
