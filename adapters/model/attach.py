"""Puts routed adapters into a base model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polyrex.adapters.errors import SpecError
from polyrex.adapters.methods.protocol import Operands
from polyrex.adapters.methods.registry import make_experts, route, routing_shape
from polyrex.adapters.serving.builder import LayerBuilder
from polyrex.adapters.serving.layers import Slice, StepContext, frozen_operands
from polyrex.adapters.spec import AdapterSpec, TargetModule
from polyrex.kernels.routing import StepRouting
from polyrex.kernels.step_plan import Planner

from .base_model import BaseIdentity
from .intuition import Intuition
from .packed_linear import PackedLinear, PackedMember, pack_projections
from .routed_linear import AddByStep, AddComposed, RoutedLinear, add_served

ALL_PROJECTIONS = r".*\.layers\.\d+\..*_proj"
"""Every projection of every decoder layer, under the names that most Hugging Face models use."""


class AdaptedModel:
    """A base model with routed layers in place; `layers[i]` sits on `targets[i]`.

    The methods `add_...` set what all layers add from then on; at first they add nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: AdapterSpec,
        targets: tuple[TargetModule, ...],
        layers: tuple[RoutedLinear, ...],
        intuition: Intuition | None = None,
    ) -> None:
        self.model = model
        self.spec = spec
        self.targets = targets
        self.layers = layers
        self.intuition = intuition
        self.made_for: BaseIdentity | None = None  # as the experts' file says, if they have one
        self._prepared: list[Operands] | None = None
        self._packed: tuple[PackedLinear, ...] = ()
        # Of all engines that are made for this model, so that each can run it after another has.
        self._context = StepContext()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the base model computes in."""
        base: Any = self.model
        found: torch.dtype = base.dtype
        return found

    @property
    def device(self) -> torch.device:
        """Where the base model and the experts lie."""
        return self.layers[0].base.weight.device

    @property
    def routes_by_token(self) -> bool:
        """Whether tokens choose among the experts, so that no task's adapter can be composed."""
        return self.layers[0].experts.routes_by_token

    def routing_shape(self) -> tuple[int, int]:
        """Shape of a router's tensor: (groups, R)."""
        return routing_shape(self.spec, self.targets)

    def route(self, logits: Tensor, *, sample: bool = False) -> Tensor:
        """Rows of the routing table, [..., M, W], of router logits [..., groups, R]."""
        if self.intuition is not None:
            logits = self.intuition.gates(logits)
        return route(self.spec, self.targets, logits, sample=sample)

    def prepare(self, dtype: torch.dtype) -> None:
        """Derive every layer's operands once, for as long as the experts stay as they are.

        Raises TensorMismatch where `dtype` cannot hold them.
        """
        self._prepared = [frozen_operands(layer.experts, dtype) for layer in self.layers]

    def add_nothing(self) -> None:
        """Run the base model alone."""
        holders: tuple[RoutedLinear | PackedLinear, ...] = (*self.layers, *self._packed)
        for layer in holders:
            layer.added = None

    def add_by_step(self, step: StepRouting | None) -> None:
        """Add the method's own `delta` for a step's tokens, or for the rows of a padded batch."""
        self.add_nothing()
        if step is None:
            return
        for layer, operands in zip(self.layers, self._operands(self.dtype), strict=True):
            layer.added = AddByStep(layer.experts, operands, step, layer.index)

    def add_composed(self, weights: Tensor) -> None:
        """Add the adapters of D tasks, from their rows of routing weights [D, M, W].

        `LowRank.delta` says which tokens they are for. Raises SpecError where tokens choose.
        """
        self.add_nothing()
        for layer, operands in zip(self.layers, self._operands(self.dtype), strict=True):
            own = layer.experts.compose(operands, weights[:, layer.index], self.dtype)
            layer.added = AddComposed(own)

    @contextmanager
    def routed(self, logits: Tensor | None) -> Iterator[None]:
        """Within it, one task's router [groups, R] routes all tokens; None: the base model alone.

        Where tokens do not choose, the task's adapter is composed once.
        """
        if logits is not None:
            weights = self.route(logits.detach().to(self.device)).unsqueeze(0)  # [1, M, W]
            if self.routes_by_token:
                row = torch.zeros(1, dtype=torch.int64, device=weights.device)
                self.add_by_step(StepRouting(weights, row, self.dtype))
            else:
                self.add_composed(weights)
        try:
            yield
        finally:
            self.add_nothing()

    def serve(
        self, dtype: torch.dtype, state_bytes: int, *, tasks: int = 0, pack: bool = False
    ) -> tuple[Planner, StepContext]:
        """Freeze the experts into the form that an engine runs, and add it from now on.

        Returns the planner of the engine's steps, and where the engine puts each step's routing.
        `state_bytes` is what layers may keep for single tasks, `tasks` the most that one step has.
        With `pack`, projections of the same x become one product for good (packed_linear.py).
        Raises TensorMismatch where `dtype` cannot hold the experts.
        """
        if pack:
            pack_projections(self.model)
        self.add_nothing()
        device = self.layers[0].base.weight.device
        builder = LayerBuilder(dtype, device, state_bytes, self._context)
        products = self._slices()
        self._packed = tuple(layer for layer in products if isinstance(layer, PackedLinear))
        on_gpu = device.type == "cuda"
        beside = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        with torch.inference_mode():
            for layer, slices in products.items():
                layer.added = add_served(builder.build(slices), self._context, beside)
        return builder.planner(self.layers[0].experts, tasks), self._context

    def _slices(self) -> dict[RoutedLinear | PackedLinear, list[Slice]]:
        """The products to whose outputs an engine adds adapters, with the modules in each."""
        found: dict[RoutedLinear | PackedLinear, list[Slice]] = {}
        for layer in self.layers:
            part = Slice.whole(layer.index, layer.experts)
            if isinstance(layer.base, PackedMember):
                part = replace(part, columns=layer.base.columns)
                found.setdefault(layer.base.packed, []).append(part)
            else:
                found[layer] = [part]
        return found

    def _operands(self, dtype: torch.dtype) -> Iterable[Operands]:
        """Each layer's operands: those that were prepared, or derived from the parameters now."""
        return self._prepared or (layer.experts.operands(dtype) for layer in self.layers)


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
        if isinstance(base, PackedMember):
            base.packed.added = None  # those of an earlier AdaptedModel
        experts = make_experts(spec, target)
        experts.reset(generator)  # on the CPU: the same values whatever the device
        layers.append(RoutedLinear(base, experts.to(base.weight.device), index))
        parent, _, attribute = target.name.rpartition(".")
        setattr(modules[parent], attribute, layers[-1])
    if intuition is not None:  # a copy: an inventory's own stays on the CPU, with its texts
        intuition = deepcopy(intuition).to(layers[0].base.weight.device)
    return AdaptedModel(model, spec, targets, tuple(layers), intuition)
