"""A deployment, predicted: its memory and the cost of its steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from polyrex.kernels.roofline.model_shapes import ModelShape
from polyrex.kernels.roofline.roofline import (
    BYTES,
    AdapterSize,
    DeviceLimits,
    Footprint,
    StepCost,
    StepForecast,
)

from .amounts import amount, device_line, digits, in_bytes, table


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


def print_deployment(deployment: Deployment) -> None:
    """Print it as tables for people."""
    console = Console(width=100, highlight=False)
    size = deployment.size
    console.print(
        f"{deployment.model}: {amount(deployment.shape.parameters)} parameters,"
        f" {in_bytes(deployment.base_bytes)}; KV cache {in_bytes(deployment.kv_bytes)} a token\n"
        f"{device_line(deployment.gpu, deployment.device)}\n"
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


def _memory_table(deployment: Deployment) -> Table:
    slots, tasks = deployment.slots, deployment.tasks
    made = table(
        "memory", "experts", "a slot", f"{slots:,} slots", "KV tokens left", "a task stored",
        f"{tasks:,} tasks",
    )  # fmt: skip
    for name, each in deployment.footprints.items():
        left = deployment.kv_tokens(each)
        made.add_row(
            name,
            in_bytes(each.experts),
            in_bytes(each.slot),
            in_bytes(slots * each.slot),
            "?" if left is None else "too large" if left < 0 else f"{left:,}",
            in_bytes(each.stored),
            in_bytes(tasks * each.stored),
        )
    return made


def _step_table(forecast: StepForecast) -> Table:
    made = table("path", "ms", "of base", "A side", "B side", "per task", "GB", "TFLOP", "launches")
    base = forecast.base
    made.add_row("base alone", *_row(base, "", "", "", ""))
    for path, cost in forecast.paths.items():
        sides = cost.parts["A side"], cost.parts["B side"]
        own = sum(cost.parts.values(), -sum(sides)) if len(cost.parts) > 2 else 0.0
        shares = (cost.seconds, *sides, own)
        made.add_row(path, *_row(cost, *(f"{share / base.seconds:.1%}" for share in shares)))
    return made


def _row(cost: StepCost, *shares: str) -> tuple[str, ...]:
    sizes = digits(cost.bytes / 1e9), digits(cost.flops / 1e12), str(cost.launches)
    return digits(1e3 * cost.seconds), *shares, *sizes


def _break_even(forecast: StepForecast) -> str:
    kept, not_kept = (
        "never" if tasks is None else f"from {tasks} distinct tasks on"
        for tasks in (forecast.break_even_kept, forecast.break_even_not_kept)
    )
    return f"shared is faster than composed {kept}; if not kept, {not_kept}"
