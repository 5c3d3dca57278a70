"""A base model in training: routed layers, a row of routing logits for each task, and the loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from polyrex.adapters.methods.composed import Composed
from polyrex.adapters.methods.protocol import Operands
from polyrex.adapters.methods.registry import method_class
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.adapters.model.routed_linear import AddByStep, AddComposed, RoutedLinear
from polyrex.kernels.routing import StepRouting
from polyrex.training.data.batches import Batch, Example, collate, collate_pairs

Groups = dict[str, list[tuple[str, nn.Parameter]]]
"""Named parameters by group: the roles that methods declare, and the tasks' `routing`."""


class LayerStack:
    """Layers of one shape, whose experts are stacked and computed together, L layers at once."""

    def __init__(self, layers: tuple[RoutedLinear, ...]) -> None:
        self._layers = layers
        self._template = layers[0].experts
        self._of_frozen: Operands | None = None
        device = next(self._template.parameters()).device
        self._indices = torch.tensor([layer.index for layer in layers], device=device)

    def operands(self, dtype: torch.dtype) -> Operands:
        """The experts' operands, each [L, ...]; derived only once while the experts are frozen."""
        frozen = not any(parameter.requires_grad for parameter in self._template.parameters())
        if frozen and self._of_frozen is not None:
            return self._of_frozen
        parameters = {name: self._stacked(name) for name, _ in self._template.named_parameters()}

        def derive(values: dict[str, Tensor]) -> Operands:
            operands: Operands = functional_call(self._template, values, (dtype,))
            return operands

        derived: Operands = torch.vmap(derive)(parameters)
        self._of_frozen = derived if frozen else None
        return derived

    def _stacked(self, name: str) -> Tensor:
        """A parameter of all layers, [L, ...]."""
        stacked = torch.stack([layer.experts.get_parameter(name) for layer in self._layers])
        if stacked.requires_grad:
            # Once, where autograd would copy every layer's part on its own.
            stacked.register_hook(lambda gradient: gradient.contiguous())  # type: ignore[no-untyped-call]
        return stacked

    def add_by_step(self, operands: Operands, step: StepRouting) -> None:
        """Have each layer add its `delta`, for a method whose tokens choose."""
        per_layer = zip(*(operand.unbind(0) for operand in operands), strict=True)
        for layer, own in zip(self._layers, per_layer, strict=True):
            layer.added = AddByStep(layer.experts, own, step, layer.index)

    def add_composed(
        self, operands: Operands, weights: Tensor, runs: Tensor | None, dtype: torch.dtype
    ) -> None:
        """Compose the adapters of D tasks from routing weights [D, M, W], and have layers add them.

        `runs` [B] is the index among the D of each row in the batch; None if D is 1.
        """
        own = weights[:, self._indices].transpose(0, 1)  # [L, D, W]

        def compose(operands: Operands, weights: Tensor) -> Composed:
            return self._template.compose(operands, weights, dtype)

        composed = torch.vmap(compose)(operands, own)
        if runs is not None:
            composed = type(composed)(*(side.index_select(1, runs) for side in composed))
        sides = zip(*(side.unbind(0) for side in composed), strict=True)
        for layer, own_sides in zip(self._layers, sides, strict=True):
            layer.added = AddComposed(type(composed)(*own_sides))


class MultiTaskModel(nn.Module):
    """An adapted model with the routers of the tasks that are trained together.

    `logits` is [tasks, groups, R]: row t is the router of task t. Experts that are frozen must keep
    their values for as long as this object is used.
    """

    def __init__(self, adapted: AdaptedModel, tasks: int, *, seed: int) -> None:
        super().__init__()
        self.adapted = adapted
        groups, _ = adapted.routing_shape()
        generator = torch.Generator().manual_seed(seed)
        method = method_class(adapted.spec.method)
        fresh = [
            torch.stack([method.initial_logits(adapted.spec, generator) for _ in range(groups)])
            for _ in range(tasks)
        ]
        self.experts = nn.ModuleList([layer.experts for layer in adapted.layers])
        self.intuition = adapted.intuition
        self.logits = nn.Parameter(torch.stack(fresh).to(adapted.device))
        shapes: dict[tuple[int, int], list[RoutedLinear]] = defaultdict(list)
        for layer in adapted.layers:
            shapes[layer.experts.target.d_in, layer.experts.target.d_out].append(layer)
        self._stacks = [LayerStack(tuple(layers)) for layers in shapes.values()]

    @contextmanager
    def routed(self, logits: Tensor, rows: Tensor, *, sample: bool = False) -> Iterator[None]:
        """Within this context, row b of a batch is routed by router `rows[b]` of D routers
        [D, groups, R].

        Where tokens do not choose, the adapters are composed once per step, for all layers of one
        shape together: layer by layer, that would be some thirty small operations each.
        """
        weights = self.adapted.route(logits, sample=sample)
        dtype = self.adapted.dtype
        step = StepRouting(weights, rows, dtype)
        try:
            for stack in self._stacks:
                operands = stack.operands(dtype)
                if self.adapted.routes_by_token:
                    stack.add_by_step(operands, step)
                else:
                    runs = rows if len(logits) > 1 else None
                    stack.add_composed(operands, weights, runs, dtype)
            yield
        finally:
            self.adapted.add_nothing()

    def collate(self, examples: Sequence[Example], pad: int, *, rows: int = 0) -> Batch:
        """Stack examples into a batch for the base model, on its device; `rows` as in
        batches.collate."""
        config: Any = self.adapted.model.config
        if config.is_encoder_decoder:
            batch = collate_pairs(examples, pad, config.decoder_start_token_id, rows=rows)
        else:
            batch = collate(examples, pad, rows=rows)
        return batch.to(self.logits.device)

    def loss(self, batch: Batch, *, sample: bool = False) -> Tensor:
        """Cross-entropy of the answers: a mean over rows of each row's mean over its tokens."""
        if batch.intuition is not None:  # one group: the whole model
            own = (
                batch.intuition.unsqueeze(1),
                torch.arange(len(batch.rows), device=batch.rows.device),
            )
        elif self.logits.numel():
            own = self.logits.index_select(0, batch.tasks), batch.rows
        else:  # one adapter for all
            own = self.logits[:1], torch.zeros_like(batch.rows[:1])
        with self.routed(*own, sample=sample):
            logits = self._logits(batch).float()
        losses = F.cross_entropy(logits, batch.targets, reduction="none")
        return (losses * batch.weights).sum()

    def _logits(self, batch: Batch) -> Tensor:
        """Logits [n, V] at the batch's n positions.

        For a decoder, they are computed at those positions only: the output layer is a fifth of a
        small model. An encoder-decoder's decoder reads only answers, so it needs nearly all.
        """
        base: Any = self.adapted.model
        if base.config.is_encoder_decoder:
            out: Tensor = base(**batch.inputs, use_cache=False).logits
            return out.flatten(0, 1).index_select(0, batch.positions)
        hidden: Tensor = base.base_model(**batch.inputs, use_cache=False).last_hidden_state
        chosen = hidden.flatten(0, 1).index_select(0, batch.positions)
        logits: Tensor = base.get_output_embeddings()(chosen)
        return logits

    def parameter_groups(self, *, routing: bool = True) -> Groups:
        """The parameters to train, by the role that the method declares, and the tasks' routing.

        Without `routing`, the group of that name is empty.
        """
        groups: Groups = {"experts": [], "gates": [], "token_routers": [], "routing": []}
        for name, parameter in self.experts.named_parameters():
            layer, _, own = name.partition(".")
            role = self.adapted.layers[int(layer)].experts.role(own)
            groups[role].append((f"experts.{name}", parameter))
        if self.intuition is not None:
            groups["experts"].append(("intuition.map", self.intuition.map))
        if routing and self.logits.numel():
            groups["routing"].append(("logits", self.logits))
        return groups

    def routers(self, names: Sequence[str]) -> dict[str, Tensor]:
        """A copy of each task's routing logits [groups, R] on the CPU, by the task's name."""
        return {name: self.logits[i].detach().cpu().clone() for i, name in enumerate(names)}
