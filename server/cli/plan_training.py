"""Training, predicted: the memory of a device, and the rows a second that it could reach."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from polyrex.adapters.methods.registry import method_class
from polyrex.adapters.model.base_model import Quantisation, torch_dtype
from polyrex.adapters.model.training_cost import adapter_costs
from polyrex.adapters.spec import AdapterSpec, TrexForm
from polyrex.kernels.roofline.model_shapes import ModelShape
from polyrex.kernels.roofline.roofline import AdapterSize, DeviceLimits, StepCost
from polyrex.kernels.roofline.training import (
    FrozenModel,
    TrainMemory,
    TrainStep,
    train_cost,
    train_memory,
)

from .amounts import amount, device_line, digits, in_bytes, table

FRAMEWORK_BYTES = {"cpu": 0.55e9, "gpu": 0.6e9}
"""What Python, PyTorch and transformers take of a CPU's memory (measured), and CUDA and its
libraries of a GPU's (not measured), beside all tensors: about."""
WEIGHT_BYTES: dict[Quantisation, float] = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
"""A number of a quantised projection; in 4 bits, 64 numbers share a float32 scale."""


@dataclass(frozen=True)
class TrainingPlan:
    """A training run, and the forecast for each of its devices."""

    model: str
    gpu: str
    shape: ModelShape
    device: DeviceLimits
    spec: AdapterSpec
    weights: str
    """The dtype of the frozen weights, or how they are quantised."""
    step: TrainStep
    tasks: int
    distinct: int
    parameters: int
    memory: TrainMemory
    cost: StepCost

    @property
    def framework(self) -> float:
        return FRAMEWORK_BYTES["cpu" if self.gpu == "cpu" else "gpu"]

    @property
    def rows_per_second(self) -> float:
        """Of all devices together."""
        return self.step.rows / self.cost.seconds

    def document(self) -> dict[str, Any]:
        """All of it, for JSON; bytes, seconds, operations."""
        return {
            **asdict(self),
            "peak_bytes": self.memory.peak,
            "peak_at": self.memory.peak_at,
            "framework_bytes": self.framework,
            "rows_per_second": self.rows_per_second,
        }


def training_plan(
    model: str,
    gpu: str,
    *,
    shape: ModelShape,
    device: DeviceLimits,
    spec: AdapterSpec,
    step: TrainStep,
    tasks: int,
    distinct: int,
    dtype: str,
    quantize: Quantisation | None,
) -> TrainingPlan:
    """Predict a run on devices of one kind, in whose steps rows are of `distinct` tasks at most.

    Raises SpecError for an unknown method, and for sizes that it does not have.
    """
    computed, mixed = torch_dtype(dtype), min(step.rows_of_part, distinct)
    frozen = frozen_model(shape, computed, quantize, fused_attention=gpu != "cpu")
    costs = adapter_costs(spec, shape, step, tasks=tasks, distinct=mixed, dtype=computed)
    return TrainingPlan(
        model=model,
        gpu=gpu,
        shape=shape,
        device=device,
        spec=spec,
        weights=quantize or dtype,
        step=step,
        tasks=tasks,
        distinct=mixed,
        parameters=costs.parameters(shape),
        memory=train_memory(frozen, costs.modules, costs.routing, step),
        cost=train_cost(frozen, costs.modules, costs.routing, step, device),
    )


def sized(method: str, form: TrexForm, size: AdapterSize) -> AdapterSpec:
    """The spec of a method, with those of the sizes that it has. Raises SpecError."""
    uses = method_class(method).uses
    return AdapterSpec(method, form=form, **{n: v for n, v in vars(size).items() if n in uses})


def frozen_model(
    shape: ModelShape,
    dtype: torch.dtype,
    quantize: Quantisation | None = None,
    *,
    fused_attention: bool,
) -> FrozenModel:
    """The base model as training loads it."""
    weight = dtype.itemsize if quantize is None else WEIGHT_BYTES[quantize]
    return FrozenModel(shape, dtype.itemsize, weight, fused_attention)


def print_training(plan: TrainingPlan) -> None:
    """Print it as a table for people."""
    console = Console(width=100, highlight=False)
    step, memory = plan.step, plan.memory
    form = f" {plan.spec.form}" if plan.spec.method == "trex" else ""
    console.print(
        f"{plan.model}: {amount(plan.shape.parameters)} parameters,"
        f" {plan.weights}, {in_bytes(memory.parts['base model'])}\n"
        f"{device_line(plan.gpu, plan.device)}\n"
        f"{plan.spec.method}{form}: {amount(plan.parameters).strip()} trained numbers,"
        f" {plan.tasks:,} tasks, on {len(plan.shape.modules)} modules\n"
        f"step: rows {step.rows:,}, tokens of a row {step.tokens:,}, devices {step.devices},"
        f" parts {step.parts}, rows of a part {step.rows_of_part:,}, distinct tasks"
        f" {plan.distinct:,}\n"
    )
    console.print(_memory_table(plan))
    console.print(
        f"\nat least {digits(1e3 * plan.cost.seconds)} ms a step, at most"
        f" {digits(plan.rows_per_second)} rows/s: {amount(plan.cost.flops)}FLOP and"
        f" {in_bytes(plan.cost.bytes)} moved on each device"
    )


def _memory_table(plan: TrainingPlan) -> Table:
    made = table("memory of a device", "bytes", "of the device")
    memory = plan.memory
    total = memory.peak + plan.framework
    rows = {
        **memory.parts,
        f"peak, at {memory.peak_at}": memory.peak,
        "framework, about": plan.framework,
        "in all": total,
    }
    for name, size in rows.items():
        of_device = "?" if plan.device.memory is None else f"{size / plan.device.memory:.1%}"
        made.add_row(name, in_bytes(size), of_device)
    return made
