"""Routed adapters inside vLLM's linear layers.

vLLM gives every linear layer a `quant_method`, which computes the product. This module replaces it
by one that then adds the adapters' contribution. Sharding, gathering, reduction, biases and
quantised weights remain vLLM's business. A compiler sees the addition as one opaque operator; an
eager model calls it directly. Nothing is added to a batch without adapters.

On a GPU an operator only launches kernels, between CUDA graphs or inside one: everything that the
host decides is in the context before the model is called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.utils.torch_utils import direct_register_custom_op

from polyrex.adapters.serving.layers import ServedLayer, StepContext
from polyrex.kernels.routing import StepRouting

OPERATOR = "polyrex_add_routed"
"""The operator that a compiled model calls, in vLLM's namespace."""


class PaddedContext(StepContext):
    """The routing of vLLM's steps, which it pads to the sizes of captured graphs."""

    _cut: tuple[StepRouting, StepRouting] | None = None

    def first(self, tokens: int) -> StepRouting | None:
        """The routing of the first `tokens` tokens, with padding or without; None as in `step`."""
        step = self.step
        if step is None or len(step.rows) == tokens:
            return step
        if self._cut is None or self._cut[0] is not step or len(self._cut[1].rows) != tokens:
            self._cut = step, _first(step, tokens)
        return self._cut[1]


def _first(step: StepRouting, tokens: int) -> StepRouting:
    assert tokens < len(step.rows), "a step larger than the largest graph is not padded"
    places = None if step.slot_places is None else step.slot_places[:tokens]
    return StepRouting(
        step.weights, step.rows[:tokens], step.dtype, step.plan, step.by_slot, places
    )


class RoutedLayer:
    """The adapters of one vLLM linear layer on one rank."""

    def __init__(self, served: ServedLayer, context: PaddedContext, gathered_ranks: int) -> None:
        """Let `served` add to the layer's output, routed by `context`.

        `gathered_ranks` is the number of ranks whose parts of the input are gathered, because the
        adapters need all of it. It is 1 if the adapters use this rank's input alone.
        """
        self._served = served
        self._context = context
        self._gathered_ranks = gathered_ranks

    def add(self, y: Tensor, x: Tensor) -> None:
        """Add the adapters' contribution for x [..., d_in] to y [..., columns], in place."""
        if x.dim() > 2:
            y, x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        step = self._context.first(len(x))
        if step is None:
            return
        if self._gathered_ranks == 1:
            self._served.add_(y, x, step)
            return
        # Every rank adds its share of the same sum, because the layer then sums over the ranks.
        whole = torch.zeros_like(y)
        self._served.add_(whole, tensor_model_parallel_all_gather(x), step)
        y.add_(whole, alpha=1 / self._gathered_ranks)


class RoutedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Computes a layer's product by its own method, then adds its adapters' contribution."""

    def __init__(self, base: Any, routed: RoutedLayer, name: str) -> None:
        self._base = base
        self._routed = routed
        self._name = name

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("a layer has its weights before it gets adapters")

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = self._base.apply(layer, x, bias)
        if torch.compiler.is_compiling():
            getattr(torch.ops.vllm, OPERATOR)(y, x, self._name)
        else:
            self._routed.add(y, x)
        return y


def install(layer: LinearBase, routed: RoutedLayer, known: dict[str, Any]) -> None:
    """Let `layer` add its adapters; `known` holds the layers that vLLM looks up by name."""
    name = f"{layer.prefix}.polyrex"
    known[name] = routed
    layer.quant_method = RoutedLinearMethod(layer.quant_method, routed, name)


def _add_routed(y: Tensor, x: Tensor, name: str) -> None:
    layer: RoutedLayer = get_forward_context().no_compile_layers[name]
    layer.add(y, x)


def _add_nothing(y: Tensor, x: Tensor, name: str) -> None:
    """Stands in for `_add_routed` while a compiler traces the model."""


def register_operator() -> None:
    """Define the operator, once per process."""
    if not hasattr(torch.ops.vllm, OPERATOR):
        direct_register_custom_op(OPERATOR, _add_routed, mutates_args=["y"], fake_impl=_add_nothing)
