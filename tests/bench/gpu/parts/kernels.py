"""Part 2: packed layers with adapters against the roofline, and against batched LoRAs.

A layer is a projection of a model with its modules packed (q, k and v are one), as an engine runs
it. Measured are its frozen product; its adapters alone; both in a row; and, beside them, LoRAs
of the same rank: gathered in plain PyTorch, on vLLM's own Triton kernels, and one for all tokens.
The roofline has the bandwidth and throughput that the same run measures. Weights are cold.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

from bench.cases import MAIN, RANK
from bench.gpu.measured import kernel_key
from bench.gpu.measuring.apart import Apart, processes
from bench.gpu.measuring.timing import copies_of, measure_limits, seconds_a_call
from bench.gpu.part import Part, run_as_part
from bench.gpu.predict import adapters_of
from bench.gpu.subjects.lora_baselines import LoraWeights
from bench.gpu.subjects.served_copies import MOST_TASKS, ServedCopies
from bench.gpu.subjects.vllm_lora import VllmKernels, VllmLora, files_folder
from polyrex.kernels.roofline.model_shapes import MODELS, Projection
from polyrex.kernels.roofline.roofline import (
    DeviceLimits,
    Step,
    StepCost,
    base_projection,
)

NAMES = {
    "8B": "meta-llama/Llama-3.1-8B",
    "1B": "meta-llama/Llama-3.2-1B",
    "70B": "meta-llama/Llama-3.1-70B",
}
GOALS = (32, 2048)
"""The numbers of tokens that goals are set for."""
OTHERS = (1, 8, 128)
TINY = Projection("qk", 20, (18, 12))
LEAST_SECONDS = 3.0
"""Time that one case may need."""
COMPILERS = 12
"""The most processes that compile kernels at once."""
COMPILE_SECONDS = 30.0
"""After which a stage is measured all the same: what is not compiled then, its cases compile."""


@dataclass(frozen=True)
class Mix:
    """T tokens of some tasks, from 1,024: the tokens of an equal number of runs, or drawn."""

    name: str
    tasks: int = MOST_TASKS
    drawn: bool = False
    popularity: float = 0.0
    """The exponent of a drawn task's popularity: 0 for uniform, 1 for Zipf's law."""

    def rows(self, tokens: int) -> list[int]:
        """The task of each token, from 0 on."""
        if not self.drawn:
            tasks = min(tokens, self.tasks)
            return [token * tasks // tokens for token in range(tokens)]
        weights = torch.arange(1, self.tasks + 1, dtype=torch.float64) ** -self.popularity
        generator = torch.Generator().manual_seed(0)
        return torch.multinomial(weights, tokens, replacement=True, generator=generator).tolist()


DISTINCT = Mix("distinct")
SWEEP = (
    Mix("uniform", drawn=True),
    Mix("zipf", drawn=True, popularity=1.0),
    Mix("identical", tasks=1),
    Mix("of 32 tasks", tasks=32),
    Mix("of 256 tasks", tasks=256),
)
"""Other popularities than distinct."""


@dataclass(frozen=True)
class Stage:
    """Cases that are compiled together, and then measured."""

    name: str
    layers: dict[str, Projection]
    tokens: Sequence[int]
    mixes: Sequence[Mix] = (DISTINCT,)
    loras: bool = False
    """Whether LoRAs are measured, or what polyrex has."""

    def with_loras(self) -> Stage:
        """The same with LoRAs."""
        return replace(self, name=f"{self.name}, LoRAs", loras=True)


def stages(dry: bool) -> list[Stage]:
    """All of them, the most important first."""
    if dry:
        tiny = Stage("8B", {"8B qk": TINY}, (3,), SWEEP[:1])
        return [tiny, tiny.with_loras()]
    layers = {
        name: {f"{name} {projection.name}": projection for projection in MODELS[model].projections}
        for name, model in NAMES.items()
    }
    goals = Stage("8B", layers["8B"], GOALS)
    others = Stage("8B, other tokens", layers["8B"], OTHERS)
    sweep = Stage("8B, other tasks", layers["8B"], GOALS, SWEEP)
    small, large = (Stage(name, layers[name], (*GOALS, *OTHERS)) for name in ("1B", "70B"))
    first = [goals, goals.with_loras(), others, sweep, others.with_loras(), sweep.with_loras()]
    return [*first, small, small.with_loras(), large, large.with_loras()]


@dataclass(frozen=True)
class Setting:
    """What all cases share."""

    device: torch.device
    dtype: torch.dtype
    dry: bool
    vllm_files: Path | None

    @classmethod
    def of(cls, part: Part) -> Setting:
        # The interpreter multiplies float16, but not bfloat16.
        dtype = torch.float16 if part.dry else torch.bfloat16
        return cls(part.device, dtype, part.dry, files_folder(part.bundle))

    @property
    def most_tokens(self) -> int:
        return 3 if self.dry else max(GOALS)

    def by_slot(self) -> AbstractContextManager[object]:
        """Within it, routing tables on this device are those of a GPU."""
        always = patch("polyrex.kernels.routing.reads_by_slot", lambda _device: True)
        return always if self.dry else nullcontext()

    def sides(self, projection: Projection, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's input x [T, d_in], and its output y [T, d] of zeros."""
        x = torch.randn(tokens, projection.d_in, device=self.device).to(self.dtype)
        return x, x.new_zeros(tokens, sum(projection.outputs))

    def served(self, method: str, projection: Projection, copies: int | None = None) -> Any:
        """Copies of a layer with a method's adapters."""
        spec = MAIN[method]
        if self.dry:
            spec, copies = replace(spec, rank=2, experts=min(spec.experts, 2)), 2
        return ServedCopies.build(
            spec, projection, self.device, self.dtype, self.most_tokens, copies
        )


class LayerCases:
    """All cases of one projection: its frozen weights, and its adapters by method."""

    def __init__(self, setting: Setting, projection: Projection, limits: DeviceLimits) -> None:
        self._setting = setting
        self._projection = projection
        self._limits = limits
        d_in, d_out = projection.d_in, sum(projection.outputs)
        self._weights = [
            torch.empty(d_out, d_in, device=setting.device, dtype=setting.dtype).normal_(0, 0.02)
            for _ in range(copies_of(2 * d_in * d_out, dry=setting.dry))
        ]
        self._served = {method: setting.served(method, projection) for method in MAIN}

    def measure(self, tokens: int, mix: Mix) -> dict[str, Any]:
        """Microseconds of all methods at one number of tokens and mix of tasks, and the share of
        the roofline that the adapters reach, alone and together with their frozen layer."""
        rows = mix.rows(tokens)
        distinct = len(set(rows))
        x, y = self._setting.sides(self._projection, tokens)
        frozen = self._seconds([partial(F.linear, x, weight) for weight in self._weights])
        predicted = self._predicted(tokens, distinct, None)
        figures: dict[str, Any] = {
            "tasks": distinct,
            "frozen_us": microseconds(frozen),
            "frozen_of_roofline": round(predicted / frozen, 3),
        }
        for method, served in self._served.items():
            served.route([row + 1 for row in rows])
            alone = self._seconds([partial(served.add_, copy, y, x) for copy in served.copies])
            both = self._seconds(list(self._with_frozen(served, x)))
            bound = self._predicted(tokens, distinct, method)
            figures[method] = {
                "alone_us": microseconds(alone),
                "layer_us": microseconds(both),
                "alone_of_roofline": round(bound / alone, 3),
                "layer_of_roofline": round((predicted + bound) / both, 3),
            }
        return figures

    def _with_frozen(self, served: ServedCopies, x: torch.Tensor) -> Iterator[Callable[[], object]]:
        """Calls of the frozen product and then the adapters, each with its own copies."""
        for number in range(max(len(self._weights), len(served.copies))):
            weight = self._weights[number % len(self._weights)]
            copy = served.copies[number % len(served.copies)]
            yield partial(_layer, weight, partial(served.add_, copy), x)

    def _seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        return seconds_a_call(calls, self._setting.device)

    def _predicted(self, tokens: int, distinct: int, method: str | None) -> float:
        """The roofline of a method's adapters, or of the frozen product."""
        if method is None:
            products = [base_projection(self._projection, tokens)]
        else:
            products = adapters_of(method, self._projection, Step(tokens, distinct))
        return StepCost.of(products, self._limits).seconds


class LoraCases:
    """LoRAs of the same rank and tasks, without the frozen product."""

    def __init__(self, setting: Setting, projection: Projection) -> None:
        self._setting = setting
        self._projection = projection
        self._vllm = VllmKernels.load(setting.vllm_files) if setting.vllm_files else None

    def measure(self, tokens: int, mix: Mix) -> dict[str, Any]:
        """Microseconds of all kinds at one number of tokens and mix of tasks."""
        rows, setting, outputs = mix.rows(tokens), self._setting, self._projection.outputs
        x, y = setting.sides(self._projection, tokens)
        tasks, rank = max(rows) + 1, 16 if setting.dry else RANK  # vLLM's least
        size = LoraWeights.bytes_of(tasks, rank, x.shape[1], outputs)
        copies = [
            LoraWeights(tasks, rank, x.shape[1], outputs, setting.dtype, setting.device)
            for _ in range(copies_of(size, dry=setting.dry))
        ]
        of_token = torch.tensor(rows, device=setting.device)
        found = {
            "lora_gathered_us": [partial(c.add_gathered_, y, x, of_token) for c in copies],
            "lora_one_for_all_us": [partial(c.add_first_, y, x) for c in copies],
        }
        if self._vllm is not None:
            self._vllm.forget()
            of_vllm = [VllmLora(self._vllm, c.a, c.b, of_token) for c in copies]
            found["lora_vllm_us"] = [partial(layer.add_, y, x) for layer in of_vllm]
        device = setting.device
        return {name: microseconds(seconds_a_call(each, device)) for name, each in found.items()}


def _layer(weight: torch.Tensor, add: Callable[..., object], x: torch.Tensor) -> None:
    y = F.linear(x, weight)
    add(y, x)


def microseconds(seconds: float) -> float:
    """Seconds as figures have them."""
    return round(1e6 * seconds, 2)


def compile_kernels(setting: Setting, tokens: Sequence[int], job: tuple[Projection, str]) -> None:
    """Run what Triton compiles for a projection and method once, which fills its cache on disk."""
    projection, method = job
    with torch.inference_mode(), setting.by_slot():
        served = setting.served(method, projection, copies=1)
        for count in tokens:
            served.route([1 + row for row in DISTINCT.rows(count)])
            x, y = setting.sides(projection, count)
            served.add_(served.copies[0], y, x)


def compile_stage(pool: ProcessPoolExecutor, setting: Setting, stage: Stage) -> dict[str, float]:
    """Compile in several processes at once: one by one, that would take most of the part's time."""
    started = time.perf_counter()
    compiling = partial(compile_kernels, setting, stage.tokens)
    jobs = product(stage.layers.values(), MAIN)
    list(pool.map(compiling, jobs, timeout=COMPILE_SECONDS))
    return {"seconds": round(time.perf_counter() - started, 1)}


def measure_stage(setting: Setting, stage: Stage, limits: DeviceLimits, part: Part) -> None:
    """Every case of a stage, layer by layer."""

    def measure_layer(projection: Projection, name: str) -> None:
        cases: LayerCases | LoraCases
        if stage.loras:
            cases = LoraCases(setting, projection)
        else:
            cases = LayerCases(setting, projection, limits)
        for tokens, mix in product(stage.tokens, stage.mixes):
            key = kernel_key(name, tokens, mix.name, loras=stage.loras)
            part.try_to(key, partial(cases.measure, tokens, mix), LEAST_SECONDS)

    with torch.inference_mode(), setting.by_slot():
        for name, projection in stage.layers.items():
            part.try_to(name, partial(measure_layer, projection, name), LEAST_SECONDS)


def measure(part: Part) -> None:
    """The part."""
    setting = Setting.of(part)
    if setting.vllm_files is None:
        part.leave_out("lora_vllm", "vLLM's files are neither in the bundle nor installed")
    limits = measure_limits(setting.device, setting.dtype, dry=setting.dry)
    part.add("limits", {"gb_per_s": limits.bandwidth / 1e9, "tflop_per_s": limits.flops / 1e12})
    # Other people's kernels must not cost the figures of ours.
    apart = {
        stage.name: Apart(part, stage.name, partial(measure_stage, setting, stage, limits))
        for stage in stages(part.dry)
        if stage.loras
    }
    workers = 1 if part.dry else min(COMPILERS, os.cpu_count() or 1)
    pool = ProcessPoolExecutor(workers, processes(part))
    for stage in stages(part.dry):
        if stage.loras:
            apart[stage.name].run(LEAST_SECONDS)
            continue
        if stage.mixes == (DISTINCT,) or part.dry:  # the kernels of other mixes are the same
            compiling = partial(compile_stage, pool, setting, stage)
            part.try_to(f"compiling {stage.name}", compiling, LEAST_SECONDS)
        measure_stage(setting, stage, limits, part)
    pool.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    run_as_part("kernels", __doc__, measure)
