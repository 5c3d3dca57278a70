"""Puts routed adapters into a base model."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyrex.adapters.errors import SpecError
from polyrex.adapters.methods.registry import make_experts, route, routing_shape
from polyrex.adapters.serving.serving import Slice, make_planner, serve_layer
from polyrex.adapters.spec import AdapterSpec, TargetModule
from polyrex.kernels.step_plan import Planner

from .intuition import Intuition
from .routed_linear import RoutedLinear, RoutingContext

ALL_PROJECTIONS = r".*\.layers\.\d+\..*_proj"
"""Every projection of every decoder layer, under the names that most Hugging Face models use."""


@dataclass(frozen=True)
class AdaptedModel:
    """A base model with routed layers in place; `layers[i]` sits on `targets[i]`."""

    model: nn.Module
    spec: AdapterSpec
    targets: tuple[TargetModule, ...]
    layers: tuple[RoutedLinear, ...]
    context: RoutingContext
    intuition: Intuition | None = None

    def routing_shape(self) -> tuple[int, int]:
        """Shape of a router's tensor: (groups, R)."""
        return routing_shape(self.spec, self.targets)

    def route(self, logits: Tensor, *, sample: bool = False) -> Tensor:
        """Rows of the routing table, [..., M, W], of router logits [..., groups, R]."""
        if self.intuition is not None:
            logits = self.intuition.gates(logits)
        return route(self.spec, self.targets, logits, sample=sample)

    def prepare(self, dtype: torch.dtype) -> None:
        """Derive every layer's operands once, where the experts stay as they are."""
        for layer in self.layers:
            layer.prepare(dtype)

    def compose(self, weights: Tensor, dtype: torch.dtype) -> None:
        """Have every layer add the adapters of these rows of routing weights, [D, M, W].

        `LowRank.delta` says which tokens they are for. Nothing happens where tokens choose.
        """
        for layer in self.layers:
            if not layer.experts.routes_by_token:
                operands = layer.operands or layer.experts.operands(dtype)
                layer.composed = layer.experts.compose(operands, weights[:, layer.index], dtype)

    def release(self) -> None:
        """Forget the routing of the last pass, and what was composed for it."""
        self.context.step = None
        for layer in self.layers:
            layer.composed = None

    def serve(self, dtype: torch.dtype, state_bytes: int) -> Planner:
        """Freeze the experts into what an engine's products read; returns what plans its steps.

        `state_bytes` is what layers may keep of single tasks. Raises TensorMismatch where `dtype`
        cannot hold the experts.
        """
        served = []
        with torch.inference_mode():
            for layer in self.layers:
                whole = Slice.whole(layer.index, layer.experts)
                layer.served = serve_layer([whole], dtype, layer.base.weight.device)
                served.append(layer.served)
        return make_planner(served, self.layers[0].experts, state_bytes)


def find_targets(model: nn.Module, pattern: str = ALL_PROJECTIONS) -> tuple[TargetModule, ...]:
    """The linear layers whose whole name matches the regular expression, in the model's order.

    Raises SpecError when none does: an adapter on nothing would silently be the base model.
    """
    matches = re.compile(pattern).fullmatch
    found = tuple(
        TargetModule(name, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and matches(name)
    )
    if not found:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        raise SpecError(
            f"no linear layer matches {pattern!r}; the model has {len(linear)}, "
            f"for example {', '.join(linear[:3])}"
        )
    return found


def attach(
    model: nn.Module,
    spec: AdapterSpec,
    targets: tuple[TargetModule, ...],
    *,
    seed: int = 0,
    intuition: Intuition | None = None,
) -> AdaptedModel:
    """Freeze `model` and replace each target module by a RoutedLinear with fresh experts.

    Raises SpecError where a target is missing, is no linear layer, or has another shape, and where
    the spec's intuition is not the one that is given.
    """
    centroids = None if intuition is None else len(intuition.centroids)
    if centroids != spec.intuition:
        raise SpecError(f"{spec.method}: intuition of {spec.intuition} centroids, got {centroids}")
    model.requires_grad_(False)
    context = RoutingContext()
    generator = torch.Generator().manual_seed(seed)
    modules = dict(model.named_modules())
    layers = []
    for index, target in enumerate(targets):
        base = modules.get(target.name)
        if not isinstance(base, nn.Linear):
            raise SpecError(f"target module {target.name}: the model has no such linear layer")
        found = base.in_features, base.out_features
        if found != (target.d_in, target.d_out):
            raise SpecError(
                f"target module {target.name}: expected {target.d_in} -> {target.d_out}, "
                f"the model has {found[0]} -> {found[1]}"
            )
        experts = make_experts(spec, target).to(base.weight.device)
        experts.reset(generator)
        layers.append(RoutedLinear(base, experts, index, context))
        parent, _, attribute = target.name.rpartition(".")
        setattr(modules[parent], attribute, layers[-1])
    return AdaptedModel(model, spec, targets, tuple(layers), context, intuition)
