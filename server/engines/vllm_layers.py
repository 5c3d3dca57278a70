"""Routed adapters inside vLLM's linear layers.

vLLM gives every linear layer a `quant_method`, which computes the product; this module puts one in
its place that adds the adapters' contribution. Sharding, gathering, reduction, biases and quantised
weights stay vLLM's business. The addition is one opaque operator, so that it runs the same way in
compiled and in eager models, and leaves a batch without adapters alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.utils.torch_utils import direct_register_custom_op

from polyrex.adapters.experts import Experts, Operands
from polyrex.adapters.routed_linear import RoutingContext
from polyrex.kernels.rank_space import shrink_and_spread
from polyrex.kernels.routing import StepRouting


@dataclass(frozen=True)
class Slice:
    """A target module as one rank sees it inside of a vLLM layer, which may pack several.

    `columns` are its outputs among the layer's; `inputs` and `outputs` are what this rank holds of
    the module's own: all of them, but for the dimension that tensor parallelism cuts.
    """

    index: int
    experts: Experts
    columns: slice
    inputs: slice
    outputs: slice


class RoutedLayer:
    """The adapters of one vLLM linear layer on one rank."""

    def __init__(
        self, slices: Sequence[Slice], context: RoutingContext, dtype: torch.dtype
    ) -> None:
        """Freeze the experts into what the products read; their tensors may be on any device."""
        self._context = context
        self._slices = tuple(slices)
        self._in_rank_space = all(part.experts.mixed_in_rank_space for part in slices)
        with torch.inference_mode():
            operands = [part.experts.operands(dtype) for part in slices]
            self._operands = [tuple(t.contiguous() for t in each) for each in operands]
            if self._in_rank_space:
                sides = [
                    a[0][:, part.inputs] for part, (a, _) in zip(slices, operands, strict=True)
                ]
                self._a = torch.cat(sides).t().contiguous().t()  # see shrink_and_spread
                self._b = [
                    b[0][:, part.outputs].contiguous()
                    for part, (_, b) in zip(slices, operands, strict=True)
                ]
        self._indices = torch.tensor([part.index for part in slices], device=self.device)

    @property
    def device(self) -> torch.device:
        return self._operands[0][0].device

    def add(self, y: Tensor, x: Tensor) -> None:
        """Add the adapters' part for x [T, d_in] to y [T, columns], in place."""
        step = self._context.step
        if step is None:
            return
        if self._in_rank_space:
            self._add_in_rank_space(y, x, step)
            return
        for part, operands in zip(self._slices, self._operands, strict=True):
            y[:, part.columns] += self._delta(part, operands, x, step)

    def _add_in_rank_space(self, y: Tensor, x: Tensor, step: StepRouting) -> None:
        weights = step.by_token.index_select(1, self._indices)
        spread = shrink_and_spread(x, self._a, weights)
        for number, (part, b) in enumerate(zip(self._slices, self._b, strict=True)):
            y[:, part.columns].addmm_(spread[:, number], b)

    def _delta(self, part: Slice, operands: Operands, x: Tensor, step: StepRouting) -> Tensor:
        """The whole module's delta for what this rank has of x, cut to what it has of y.

        Inputs that other ranks hold are 0 here: delta is linear, and the layer sums over ranks.
        """
        missing = part.experts.target.d_in - x.shape[1]
        if missing:
            x = F.pad(x, (part.inputs.start, missing - part.inputs.start))
        return part.experts.delta(operands, x, step.module(part.index))[:, part.outputs]


class RoutedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """A layer's own method, and then its adapters."""

    def __init__(self, base: Any, name: str) -> None:
        self._base = base
        self._name = name

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("the layer's weights exist before its adapters do")

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = self._base.apply(layer, x, bias)
        torch.ops.vllm.polyrex_add_routed(y, x, self._name)
        return y


def install(layer: LinearBase, routed: RoutedLayer, known: dict[str, Any]) -> None:
    """Let `layer` add its adapters; `known` is where vLLM finds layers by name while it runs."""
    name = f"{layer.prefix}.polyrex"
    known[name] = routed
    layer.quant_method = RoutedLinearMethod(layer.quant_method, name)


def _add_routed(y: Tensor, x: Tensor, name: str) -> None:
    layer: RoutedLayer = get_forward_context().no_compile_layers[name]
    layer.add(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]))


def _add_nothing(y: Tensor, x: Tensor, name: str) -> None:
    """What a compiler traces in place of `_add_routed`."""


def register_operator() -> None:
    """Define the operator; once a process."""
    if not hasattr(torch.ops.vllm, "polyrex_add_routed"):
        direct_register_custom_op(
            "polyrex_add_routed", _add_routed, mutates_args=["y"], fake_impl=_add_nothing
        )
