"""A base model under training: routed layers, one row of routing logits a task, the loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from polyrex.adapters.attach import AdaptedModel
from polyrex.adapters.experts import Experts, Operands
from polyrex.adapters.methods import method_class
from polyrex.adapters.routed_linear import RoutedLinear
from polyrex.kernels.routing import StepRouting

from .batches import IGNORED, Batch


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
        self.logits = nn.Parameter(torch.stack(fresh))

    def set_routing(self, tasks: Tensor, tokens: int, *, sample: bool = False) -> None:
        """Route a batch, `tasks` [B] and `tokens` a row: one row of weights a distinct task."""
        distinct, positions = torch.unique(tasks, return_inverse=True)
        weights = self.adapted.route(self.logits[distinct], sample=sample)
        base: Any = self.adapted.model
        self.adapted.context.step = StepRouting(
            weights, positions.repeat_interleave(tokens), base.dtype, run=tokens
        )

    def derive_operands(self) -> None:
        """Make every layer's experts into operands, all layers of one shape at once.

        One by one, each layer and side would be some thirty small operations.
        """
        shapes: dict[tuple[int, int], list[RoutedLinear]] = defaultdict(list)
        for layer in self.adapted.layers:
            shapes[layer.experts.target.d_in, layer.experts.target.d_out].append(layer)
        base: Any = self.adapted.model
        for layers in shapes.values():
            template = layers[0].experts
            parameters = {
                name: torch.stack([layer.experts.get_parameter(name) for layer in layers])
                for name, _ in template.named_parameters()
            }

            def derive(values: dict[str, Tensor], template: Experts = template) -> Operands:
                operands: Operands = functional_call(template, values, (base.dtype,))
                return operands

            stacked = torch.vmap(derive)(parameters)
            per_layer = zip(*(operand.unbind(0) for operand in stacked), strict=True)
            for layer, operands in zip(layers, per_layer, strict=True):
                layer.operands = operands

    def release(self) -> None:
        """Forget the last step's operands and routing, which hold on to its whole graph."""
        self.adapted.context.step = None
        for layer in self.adapted.layers:
            layer.operands = None

    def loss(self, batch: Batch, *, sample: bool = False) -> Tensor:
        """Cross-entropy of the answers, a mean over rows of the mean over each row's tokens.

        Logits are computed only where there are labels: the vocabulary is a fifth of a small model.
        """
        if any(parameter.requires_grad for parameter in self.experts.parameters()):
            self.derive_operands()
        self.set_routing(batch.tasks, batch.tokens.shape[1], sample=sample)
        # Position t predicts the token at t + 1.
        targets = batch.labels[:, 1:]
        chosen = targets != IGNORED
        logits = self.next_token_logits(batch.tokens, chosen)
        losses = F.cross_entropy(logits.float(), targets[chosen], reduction="none")
        return (losses * batch.weights[:, 1:][chosen]).sum()

    def next_token_logits(self, tokens: Tensor, chosen: Tensor, **inputs: Any) -> Tensor:
        """Logits [n, V] at the n positions that `chosen` [B, T - 1] picks, row by row."""
        base: Any = self.adapted.model
        hidden = base.base_model(input_ids=tokens, use_cache=False, **inputs).last_hidden_state
        logits: Tensor = base.get_output_embeddings()(hidden[:, :-1][chosen])
        return logits

    def parameter_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Trainable parameters by role: `experts`, `gates` (scalars), `routing`."""
        experts: list[tuple[str, nn.Parameter]] = []
        gates: list[tuple[str, nn.Parameter]] = []
        for name, parameter in self.experts.named_parameters():
            (gates if parameter.numel() == 1 else experts).append((f"experts.{name}", parameter))
        routing = [("logits", self.logits)] if self.logits.numel() else []
        return {"experts": experts, "gates": gates, "routing": routing}

    def routers(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Each task's routing logits [groups, R], detached, by the task's name."""
        return {name: self.logits[i].detach().clone() for i, name in enumerate(names)}
