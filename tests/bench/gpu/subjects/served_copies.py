"""Copies of a packed layer with adapters, as an engine serves them, to time with cold weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.gpu.measuring.timing import MOST_COPIES
from polyrex.adapters.methods.protocol import Experts
from polyrex.adapters.methods.registry import make_experts, method_class
from polyrex.adapters.serving.builder import LayerBuilder
from polyrex.adapters.serving.layers import ServedLayer, Slice, StepContext
from polyrex.adapters.spec import AdapterSpec, TargetModule
from polyrex.kernels.roofline.model_shapes import Projection
from polyrex.kernels.routing import RoutingTable, StepRouting

MOST_TASKS = 1024
CUDA = torch.device("cuda")
"""Layers are those of a GPU also in a dry run, where Triton interprets them."""


@dataclass
class ServedCopies:
    """Layers of equal shape, of one method, with a routing table that has rows for all of them."""

    copies: list[ServedLayer]
    context: StepContext
    table: RoutingTable
    dtype: torch.dtype

    @classmethod
    def build(
        cls,
        spec: AdapterSpec,
        projection: Projection,
        device: torch.device,
        dtype: torch.dtype,
        tokens: int,
        copies: int | None,
    ) -> ServedCopies:
        """Random experts for steps of up to `tokens` tokens of up to `MOST_TASKS` tasks."""
        count = MOST_COPIES if copies is None else copies
        builder = LayerBuilder(dtype, CUDA, 0)
        packed = [_slices(spec, projection, number, device) for number in range(count)]
        layers = [builder.build(slices) for slices in packed]
        method = method_class(spec.method)
        modules, width = count * len(projection.outputs), method.table_size(spec)
        table = RoutingTable(
            MOST_TASKS + 1,
            modules,
            width,
            device,
            planner=builder.planner(packed[0][0].experts, MOST_TASKS),
            max_tokens=tokens,
        )
        logits = torch.randn(MOST_TASKS, modules, method.routing_size(spec), device=device)
        for slot, weights in enumerate(method.route(spec, logits), start=1):
            table.write(slot, weights)
        return cls(layers, builder.context, table, dtype)

    def route(self, slots: list[int]) -> None:
        """Set the step of the next calls: token t belongs to the task of `slots[t]`."""
        self.context.set(self.table.step(slots, self.dtype))

    def add_(self, copy: ServedLayer, y: Tensor, x: Tensor) -> None:
        """Add one copy's adapters for x [T, d_in] to y [T, d], in place."""
        step = self.context.step
        assert isinstance(step, StepRouting)
        copy.add_(y, x, step)


def _slices(
    spec: AdapterSpec, projection: Projection, number: int, device: torch.device
) -> list[Slice]:
    """The modules of one copy, side by side, with random experts."""
    slices, begin = [], 0
    for place, d_out in enumerate(projection.outputs):
        index = number * len(projection.outputs) + place
        experts = make_experts(spec, TargetModule(str(index), projection.d_in, d_out)).to(device)
        _draw(experts)
        columns = slice(begin, begin + d_out)
        slices.append(Slice(index, experts, columns, slice(0, projection.d_in), slice(0, d_out)))
        begin += d_out
    return slices


def _draw(experts: Experts) -> None:
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0, 0.5)
