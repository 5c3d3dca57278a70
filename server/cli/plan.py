"""`polyrex plan`: the memory and speed of a deployment, predicted from shapes alone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.types import NonNegativeInt, PositiveFloat, PositiveInt
from rich import box
from rich.console import Console
from rich.table import Table

from polyrex.kernels.roofline.model_shapes import MODELS, ModelShape
from polyrex.kernels.roofline.roofline import (
    BYTES,
    EFFICIENCY,
    GPUS,
    AdapterSize,
    DeviceLimits,
    Footprint,
    Step,
    StepCost,
    StepForecast,
    footprints,
    forecast,
)
from polyrex.server.config import VllmEngineConfig
from polyrex.server.launch.model_shape import model_shape, unknown_name

CPU = "cpu"


@dataclass(frozen=True)
class Deployment:
    """A deployment, and the forecast for it."""

    model: str
    gpu: str
    shape: ModelShape
    device: DeviceLimits
    size: AdapterSize
    tasks: int
    slots: int
    footprints: dict[str, Footprint]
    steps: dict[str, StepForecast]  # "decode", "prefill"

    @property
    def base_bytes(self) -> int:
        return BYTES * self.shape.parameters

    @property
    def kv_bytes(self) -> int:
        """Of one token's keys and values."""
        return BYTES * self.shape.kv_numbers

    def kv_tokens(self, footprint: Footprint) -> int | None:
        """Tokens whose keys and values fit beside all slots; None where the memory is unknown.

        Negative where the rest alone is too large.
        """
        if self.device.memory is None:
            return None
        taken = self.base_bytes + footprint.experts + self.slots * footprint.slot
        return int((self.device.memory - taken) // self.kv_bytes)

    def document(self) -> dict[str, Any]:
        """All of it, for JSON; bytes, seconds, operations."""
        return {
            **asdict(self),
            "parameters": self.shape.parameters,
            "base_bytes": self.base_bytes,
            "kv_bytes_per_token": self.kv_bytes,
            "kv_tokens": {name: self.kv_tokens(each) for name, each in self.footprints.items()},
        }


def plan(
    *,
    model: Annotated[
        str, Parameter(help=f"A folder with a config.json, or one of {', '.join(MODELS)}.")
    ],
    gpu: Annotated[str, Parameter(help=f"{', '.join(GPUS)}, or {CPU}, which is measured.")],
    tasks: Annotated[PositiveInt, Parameter(help="Registered tasks.")] = 1000,
    experts: Annotated[PositiveInt, Parameter(help="Experts E of a module.")] = 8,
    rank: Annotated[PositiveInt, Parameter(help="LoRA rank r; I and J of static trex.")] = 16,
    order: Annotated[PositiveInt, Parameter(help="Tensor order N.")] = 2,
    slots: Annotated[
        PositiveInt, Parameter(help="Rows of the routing table on the device.")
    ] = VllmEngineConfig.slots,
    batch: Annotated[PositiveInt, Parameter(help="Requests that decode together.")] = 32,
    distinct: Annotated[
        PositiveInt | None,
        Parameter(help="Distinct tasks of a step; one for each request if not given."),
    ] = None,
    context: Annotated[
        NonNegativeInt, Parameter(help="Cached tokens of a decoding request.")
    ] = 512,
    reuse: Annotated[
        PositiveInt, Parameter(help="Decode steps that composed weights serve if not kept.")
    ] = Step.reuse,
    prompts: Annotated[PositiveInt, Parameter(help="Prompts of a prefill step.")] = 4,
    prompt_tokens: Annotated[PositiveInt, Parameter(help="Tokens of a prompt.")] = 512,
    bandwidth_gbs: Annotated[
        PositiveFloat | None, Parameter(help="GB/s that the device reaches.")
    ] = None,
    tflops: Annotated[
        PositiveFloat | None, Parameter(help="bfloat16 TFLOP/s that the device reaches.")
    ] = None,
    as_json: Annotated[
        bool, Parameter(name="--json", help="Print one JSON document.", negative=())
    ] = False,
) -> None:
    """Predict memory, the cost of a step on every path, and where the shared path begins to pay.

    A roofline: lower bounds from bytes and operations, in bfloat16, with adapters on every
    projection. Launches and small operations are not in it.
    """
    gpu = gpu.lower()
    shape = model_shape(model)
    device = device_limits(gpu, bandwidth_gbs, tflops)
    size = AdapterSize(experts, rank, order)
    most = min(tasks, distinct or tasks)
    steps = {
        "decode": Step(batch, min(batch, most), batch, context, reuse),
        "prefill": Step(prompts * prompt_tokens, min(prompts, most), prompts),
    }
    deployment = Deployment(
        model, gpu, shape, device, size, tasks, min(slots, tasks), footprints(shape, size),
        {name: forecast(shape, step, size, device) for name, step in steps.items()},
    )  # fmt: skip
    if as_json:
        print(json.dumps(deployment.document(), indent=2))
    else:
        _print(deployment)


def device_limits(name: str, bandwidth_gbs: float | None, tflops: float | None) -> DeviceLimits:
    """The speed that a device reaches; given figures replace its own.

    The CPU is measured, unless both are given. Raises PlanError.
    """
    given: dict[str, float] = {}
    if bandwidth_gbs is not None:
        given["bandwidth"] = bandwidth_gbs * 1e9
    if tflops is not None:
        given["flops"] = tflops * 1e12
    if name in GPUS:
        return replace(GPUS[name], **given)
    if name != CPU:
        raise unknown_name("gpu", name, [*GPUS, CPU])
    if len(given) == 2:
        return DeviceLimits(**given)
    from polyrex.kernels.roofline.device_limits import measure_device

    return replace(measure_device(), **given)


def _print(deployment: Deployment) -> None:
    console = Console(width=100, highlight=False)
    size, device = deployment.size, deployment.device
    memory = "" if device.memory is None else f", {_bytes(device.memory)}"
    console.print(
        f"{deployment.model}: {_amount(deployment.shape.parameters)} parameters,"
        f" {_bytes(deployment.base_bytes)}; KV cache {_bytes(deployment.kv_bytes)} a token\n"
        f"{deployment.gpu}: {_bytes(device.bandwidth)}/s, {_amount(device.flops)}FLOP/s{memory}"
        f" ({_source(deployment)})\n"
        f"adapters: E = {size.experts}, r = {size.rank}, N = {size.order},"
        f" on {len(deployment.shape.modules)} modules\n"
    )
    console.print(_memory_table(deployment))
    for name, each in deployment.steps.items():
        step = each.step
        console.print(
            f"\n{name}: tokens {step.tokens:,}, requests {step.sequences},"
            f" distinct tasks {step.distinct}, cached tokens of a request {step.context:,}"
        )
        console.print(_step_table(each))
        console.print(_break_even(each))


def _source(deployment: Deployment) -> str:
    if deployment.device == GPUS.get(deployment.gpu):
        return f"{EFFICIENCY} of the data sheet's speeds"
    return "speeds as measured or given"


def _table(first: str, *columns: str) -> Table:
    table = Table(first, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _memory_table(deployment: Deployment) -> Table:
    slots, tasks = deployment.slots, deployment.tasks
    table = _table(
        "memory", "experts", "a slot", f"{slots:,} slots", "KV tokens left", "a task stored",
        f"{tasks:,} tasks",
    )  # fmt: skip
    for name, each in deployment.footprints.items():
        left = deployment.kv_tokens(each)
        table.add_row(
            name,
            _bytes(each.experts),
            _bytes(each.slot),
            _bytes(slots * each.slot),
            "?" if left is None else "too large" if left < 0 else f"{left:,}",
            _bytes(each.stored),
            _bytes(tasks * each.stored),
        )
    return table


def _step_table(forecast: StepForecast) -> Table:
    table = _table(
        "path", "ms", "of base", "A side", "B side", "per task", "GB", "TFLOP", "products"
    )
    base = forecast.base
    table.add_row("base alone", *_row(base, "", "", "", ""))
    for path, cost in forecast.paths.items():
        sides = cost.parts["A side"], cost.parts["B side"]
        own = sum(cost.parts.values(), -sum(sides)) if len(cost.parts) > 2 else 0.0
        shares = (cost.seconds, *sides, own)
        table.add_row(path, *_row(cost, *(f"{share / base.seconds:.1%}" for share in shares)))
    return table


def _row(cost: StepCost, *shares: str) -> tuple[str, ...]:
    sizes = _digits(cost.bytes / 1e9), _digits(cost.flops / 1e12), str(cost.products)
    return _digits(1e3 * cost.seconds), *shares, *sizes


def _break_even(forecast: StepForecast) -> str:
    kept, not_kept = (
        "never" if tasks is None else f"from {tasks} distinct tasks on"
        for tasks in (forecast.break_even_kept, forecast.break_even_not_kept)
    )
    return f"shared is faster than composed {kept}; if not kept, {not_kept}"


def _bytes(number: float) -> str:
    return f"{_amount(number)}B"


def _amount(number: float) -> str:
    """Three digits and a unit: 83886080 -> 83.9 M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{_digits(number / size)} {unit}"
    return f"{_digits(number)} "


def _digits(number: float) -> str:
    """Three digits, or all before the point where there are more."""
    return f"{number:,.0f}" if number >= 999.5 else f"{number:.3g}"
