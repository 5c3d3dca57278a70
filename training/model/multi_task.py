"""A base model under training: routed layers, one row of routing logits a task, the loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from polyrex.adapters.methods.composed import Composed
from polyrex.adapters.methods.protocol import Operands
from polyrex.adapters.methods.registry import method_class
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.adapters.model.routed_linear import RoutedLinear
from polyrex.kernels.routing import StepRouting
from polyrex.training.data.batches import IGNORED, Batch, Example, collate, collate_pairs
from polyrex.training.loop.optimiser import Groups


class LayerStack:
    """The layers of one shape, whose experts are computed with as one, L layers at once."""

    def __init__(self, layers: tuple[RoutedLinear, ...]) -> None:
        self._layers = layers
        self._template = layers[0].experts
        self._frozen: Operands | None = None
        self._indices = torch.tensor([layer.index for layer in layers])

    def operands(self, dtype: torch.dtype) -> Operands:
        """The experts' operands, each [L, ...]; kept for as long as the experts are frozen."""
        if self._frozen is not None:
            return self._frozen
        parameters = {
            name: torch.stack([layer.experts.get_parameter(name) for layer in self._layers])
            for name, _ in self._template.named_parameters()
        }

        def derive(values: dict[str, Tensor]) -> Operands:
            operands: Operands = functional_call(self._template, values, (dtype,))
            return operands

        derived: Operands = torch.vmap(derive)(parameters)
        if not any(parameter.requires_grad for parameter in self._template.parameters()):
            self._frozen = derived
        return derived

    def hand_out_operands(self, operands: Operands) -> None:
        """Give each layer its own, for a method whose tokens choose."""
        per_layer = zip(*(operand.unbind(0) for operand in operands), strict=True)
        for layer, own in zip(self._layers, per_layer, strict=True):
            layer.operands = own

    def hand_out_adapters(
        self, operands: Operands, weights: Tensor, runs: Tensor | None, dtype: torch.dtype
    ) -> None:
        """Compose the adapters of D tasks from routing weights [D, M, W], and give them to layers.

        `runs` [B] says which of the D each row of the batch has; None: all have the only one.
        """
        own = weights[:, self._indices].transpose(0, 1)  # [L, D, W]

        def compose(operands: Operands, weights: Tensor) -> Composed:
            return self._template.compose(operands, weights, dtype)

        composed = torch.vmap(compose)(operands, own)
        if runs is not None:
            composed = type(composed)(*(side.index_select(1, runs) for side in composed))
        sides = zip(*(side.unbind(0) for side in composed), strict=True)
        for layer, own_sides in zip(self._layers, sides, strict=True):
            layer.composed = type(composed)(*own_sides)

    def release(self) -> None:
        """Forget the operands: the experts may be trained again, or otherwise, from here on."""
        self._frozen = None
        for layer in self._layers:
            layer.operands = None


class MultiTaskModel(nn.Module):
    """The adapted model with the routers of the tasks that are trained together.

    `logits` is [tasks, groups, R]: row t is task t's router.
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
        self.logits = nn.Parameter(torch.stack(fresh))
        shapes: dict[tuple[int, int], list[RoutedLinear]] = defaultdict(list)
        for layer in adapted.layers:
            shapes[layer.experts.target.d_in, layer.experts.target.d_out].append(layer)
        self._stacks = [LayerStack(tuple(layers)) for layers in shapes.values()]

    def set_routing(self, tasks: Tensor, *, sample: bool = False) -> None:
        """Route a batch, `tasks` [B]: one row of weights a distinct task."""
        if not self.logits.numel():
            tasks = torch.zeros_like(tasks[:1])  # one adapter for all
        distinct, positions = torch.unique(tasks, return_inverse=True)
        self._route(self.logits[distinct], positions, sample=sample)

    def _route(self, logits: Tensor, positions: Tensor, *, sample: bool) -> None:
        """Route the rows of a batch by D routers [D, groups, R]; `positions` [B] says by which.

        Where tokens do not choose, each adapter is composed once, for all layers of a shape at
        once: one by one, each layer would be some thirty small operations.
        """
        weights = self.adapted.route(logits, sample=sample)
        base: Any = self.adapted.model
        self.adapted.context.step = StepRouting(weights, positions, base.dtype)
        for stack in self._stacks:
            operands = stack.operands(base.dtype)
            if self.adapted.layers[0].experts.routes_by_token:
                stack.hand_out_operands(operands)
            else:
                runs = positions if len(logits) > 1 else None
                stack.hand_out_adapters(operands, weights, runs, base.dtype)

    def release(self) -> None:
        """Forget the last step's adapters and routing, which hold on to its whole graph."""
        self.adapted.release()
        for stack in self._stacks:
            stack.release()

    def collate(self, examples: Sequence[Example], pad: int, *, rows: int = 0) -> Batch:
        """A batch as the base model takes it; `rows` as in batches.collate."""
        config: Any = self.adapted.model.config
        if config.is_encoder_decoder:
            return collate_pairs(examples, pad, config.decoder_start_token_id, rows=rows)
        return collate(examples, pad, rows=rows)

    def loss(self, batch: Batch, *, sample: bool = False) -> Tensor:
        """Cross-entropy of the answers, a mean over rows of the mean over each row's tokens."""
        if batch.intuition is None:
            self.set_routing(batch.tasks, sample=sample)
        else:
            own = batch.intuition.unsqueeze(1)  # one group: the whole model
            self._route(own, torch.arange(len(own)), sample=sample)
        chosen = batch.targets != IGNORED
        logits = self._logits(batch.inputs, chosen).float()
        losses = F.cross_entropy(logits, batch.targets[chosen], reduction="none")
        return (losses * batch.weights[chosen]).sum()

    def _logits(self, inputs: dict[str, Tensor], chosen: Tensor) -> Tensor:
        """Logits [n, V] at the n positions that `chosen` [B, T] picks, row by row.

        A decoder's are computed there alone: the vocabulary is a fifth of a small model. What an
        encoder's decoder reads is the answer, so that nearly all of its positions are wanted.
        """
        base: Any = self.adapted.model
        if base.config.is_encoder_decoder:
            logits: Tensor = base(**inputs, use_cache=False).logits[chosen]
        else:
            hidden = base.base_model(**inputs, use_cache=False).last_hidden_state
            logits = base.get_output_embeddings()(hidden[chosen])
        return logits

    def parameter_groups(self) -> Groups:
        """Trainable parameters by role; a gate is a scalar, `routing` the logits of tasks."""
        groups: Groups = {"experts": [], "gates": [], "token_routers": [], "routing": []}
        for name, parameter in self.experts.named_parameters():
            role = "gates" if parameter.numel() == 1 else "experts"
            if name.endswith(".token_router"):
                role = "token_routers"
            groups[role].append((f"experts.{name}", parameter))
        if self.intuition is not None:
            groups["experts"].append(("intuition.map", self.intuition.map))
        if self.logits.numel():
            groups["routing"].append(("logits", self.logits))
        return groups

    def routers(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Each task's routing logits [groups, R], detached, by the task's name."""
        return {name: self.logits[i].detach().clone() for i, name in enumerate(names)}
