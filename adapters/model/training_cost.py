"""What training a method's adapters takes, traced on the meta device: nothing is computed.

The protocol of methods is run as a training step runs it, so that a method needs nothing here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from polyrex.adapters.methods.protocol import Experts
from polyrex.adapters.methods.registry import make_experts, method_class, routing_shape
from polyrex.adapters.spec import AdapterSpec, TargetModule
from polyrex.kernels.roofline.model_shapes import ModelShape
from polyrex.kernels.roofline.training import ModuleCost, TrainStep
from polyrex.kernels.routing import StepRouting

from .routed_linear import AddByStep, AddComposed, Addition


@dataclass(frozen=True)
class AdapterCosts:
    """What a step takes of adapters on all projections of a model."""

    modules: tuple[ModuleCost, ...]  # of one decoder layer
    routing: int  # a count of numbers: the routers of all tasks, and what they share

    def parameters(self, shape: ModelShape) -> int:
        """The count of all numbers that are trained."""
        return self.routing + shape.layers * sum(module.parameters for module in self.modules)


def adapter_costs(
    spec: AdapterSpec,
    shape: ModelShape,
    step: TrainStep,
    *,
    tasks: int,
    distinct: int,
    dtype: torch.dtype,
) -> AdapterCosts:
    """The costs of a step whose parts have rows of `distinct` tasks each, among `tasks`.

    Raises SpecError as `make_experts` does.
    """
    rows, tokens = step.rows_of_part, step.tokens
    by_size = {
        size: module_cost(spec, *size, rows=rows, tokens=tokens, distinct=distinct, dtype=dtype)
        for size in set(shape.modules)
    }
    per_layer = len(shape.modules) // shape.layers
    targets = tuple(
        TargetModule(f"model.layers.{number // per_layer}.{number}", *size)
        for number, size in enumerate(shape.modules)
    )
    groups, logits = routing_shape(spec, targets)
    return AdapterCosts(
        modules=tuple(by_size[size] for size in shape.modules[:per_layer]),
        routing=tasks * groups * logits + (spec.intuition or 0) * spec.gates,
    )


def module_cost(
    spec: AdapterSpec,
    d_in: int,
    d_out: int,
    *,
    rows: int,
    tokens: int,
    distinct: int,
    dtype: torch.dtype,
) -> ModuleCost:
    """The cost of the adapter on a d_in -> d_out module, for `rows` rows of `tokens` tokens.

    The rows are of `distinct` tasks. Raises SpecError as `make_experts` does.
    """
    method = method_class(spec.method)
    distinct = distinct if method.routing_size(spec) else 1  # one adapter for all
    with torch.device("meta"):
        experts = make_experts(spec, TargetModule("module", d_in, d_out))
        weights = torch.empty(distinct, method.table_size(spec), requires_grad=True)
        x = torch.empty(rows, tokens, d_in, dtype=dtype, requires_grad=True)
        y = torch.empty(rows, tokens, d_out, dtype=dtype)
        runs = torch.zeros(rows, dtype=torch.int64)
        with _kept() as derived, FlopCounterMode(display=False) as composing:
            addition, operands = _addition(experts, weights, runs, dtype)
        with _kept() as own, FlopCounterMode(display=False) as adding:
            addition.add_to(y, x)
    read, given = _storages(operands), _storages((x,))
    known = {*read, *given, *derived, *_storages((weights, *experts.parameters()))}
    return ModuleCost(
        d_in=d_in,
        d_out=d_out,
        parameters=sum(parameter.numel() for parameter in experts.parameters()),
        derived=sum(size for storage, size in derived.items() if storage not in read),
        operands=sum(read.values()),
        own=sum(size for storage, size in own.items() if storage not in known),
        reads_input=not given.keys().isdisjoint(own),
        compose_flops=composing.get_total_flops(),
        layer_flops=adding.get_total_flops(),
    )


def _addition(
    experts: Experts, weights: Tensor, runs: Tensor, dtype: torch.dtype
) -> tuple[Addition, tuple[Tensor, ...]]:
    """What a layer adds for rows with routing weights `weights[runs]`, and the tensors in it."""
    operands = experts(dtype)
    if experts.routes_by_token:
        step = StepRouting(weights.unsqueeze(1), runs, dtype)
        return AddByStep(experts, operands, step, 0), operands
    composed = experts.compose(operands, weights, dtype)
    if len(weights) > 1:
        composed = type(composed)(*(side.index_select(0, runs) for side in composed))
    return AddComposed(composed), composed


@contextmanager
def _kept() -> Iterator[dict[int, int]]:
    """Within it, the dict takes the bytes of each storage that is kept for the backward pass."""
    found: dict[int, int] = {}
    held: list[Tensor] = []  # so that no storage takes the place of another

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        found.update(_storages((tensor,)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The bytes of the storages of tensors, by the storage's identity."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage.nbytes() for storage in storages}
