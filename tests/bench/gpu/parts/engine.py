"""Part 3: the embedded engine with many tasks, on a random model of Llama-3.1-8B's shape.

Measured first are decode steps: requests of 17 prompt tokens, all at once and all past their
prompts, without adapters, of one task and of 32, 256 and 1,024 distinct tasks; a step ends when the
host has read its tokens. A baseline serves LoRAs of 256 tasks in plain PyTorch. Then come whole
completions of 47 new tokens in the engine with its thread, the prompts included; and then decode
steps without CUDA graphs. Contenders take turns: a ratio is that of one turn over the mean of the
nearest turns without adapters.

Each method runs in a process of its own, and so does the baseline.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from bench.cases import MAIN
from bench.engine_requests import answer, tokens_per_second
from bench.gpu.measured import LORA, decode_key, end_to_end_key, of_base
from bench.gpu.measuring.apart import Apart
from bench.gpu.measuring.profiling import DeviceWork, watched
from bench.gpu.part import Part, run_as_part
from bench.gpu.subjects.lora_baselines import GatheredLoraLayer
from bench.gpu.subjects.random_model import SHAPE_8B, TINY
from bench.gpu.subjects.served_model import PROMPT, Decoder, ServedModel, config_for
from bench.harness import Turns, seconds_of
from polyrex.adapters.files.task import TaskVersion
from polyrex.adapters.serving.builder import LayerBuilder
from polyrex.adapters.serving.layers import Slice
from polyrex.kernels.roofline.roofline import BYTES
from polyrex.server.engines.embedded.engine import EmbeddedEngine

Levels = Mapping[int, tuple[int, ...]]
"""Numbers of requests at once, and of the distinct tasks among them."""

WARM_UP_STEPS, STEPS = 3, 12
"""Decode steps that are not timed, and steps that are: none of them asks for a block of cache."""
WATCHED_STEPS = 2
ROUNDS = 2
LEAST_SECONDS = 5.0
"""Time that one level may need, or counting the kernels of a step."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run."""

    levels: Levels
    baseline: Levels
    whole: Levels
    """What runs to its end in the engine."""
    eager: Levels
    """What is measured without graphs."""
    new_tokens: int
    steps: int

    @classmethod
    def of(cls, part: Part) -> Sizes:
        if part.dry:
            few = {4: (4,)}
            return cls({4: (1, 4)}, few, few, few, 3, 2)
        levels = {32: (1, 32), 256: (256,), 1024: (1024,)}
        whole = {32: (32,), 1024: (1024,)}
        return cls(levels, {256: (256,)}, whole, {32: (32,)}, 47, STEPS)


@dataclass(frozen=True)
class Job:
    """What one process measures of one contender."""

    name: str
    levels: Levels
    sizes: Sizes
    measure: Callable[[Job, Part, ServedModel], None]
    least: float
    """Seconds without which it is not begun; a level, or a count of kernels, needs few of them."""
    graphs: bool = True

    @property
    def most(self) -> int:
        """The most requests at once, and the number of tasks."""
        return max(self.levels)

    @property
    def key(self) -> str:
        """What is left out where the job fails as a whole."""
        steps = self.measure.__name__.replace("_", " ")
        return f"{self.name}, graphs {'on' if self.graphs else 'off'}, {steps}"


def jobs(sizes: Sizes) -> Iterator[Job]:
    """All of them, the most important first."""
    for name in MAIN:
        yield Job(name, sizes.levels, sizes, decode_steps, least=20)
    yield Job(LORA, sizes.baseline, sizes, decode_steps, least=20)
    for name in MAIN:
        yield Job(name, sizes.whole, sizes, whole_completions, least=35)
    for name in MAIN:
        yield Job(name, sizes.eager, sizes, decode_steps, least=15, graphs=False)


def run_job(job: Job, part: Part) -> None:
    """Build the model, measure, and keep the peak of memory."""
    logging.basicConfig(level=logging.WARNING)
    spec = MAIN["trex-static" if job.name == LORA else job.name]
    shape = TINY if part.dry else SHAPE_8B
    layers: AbstractContextManager[object] = nullcontext()
    if job.name == LORA:
        slots = config_for(job.most, graphs=job.graphs).slots
        layers = patch.object(LayerBuilder, "build", _lora_layers(part, slots))
    with ServedModel.build(shape, spec, job.most, part.device, dtype_of(part)) as served, layers:
        gc.freeze()  # or the collector goes through all modules while the clock runs
        job.measure(job, part, served)
    if part.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
        part.add(f"{job.key}, memory", {"peak_gb": round(peak, 2)})


def decode_steps(job: Job, part: Part, served: ServedModel) -> None:
    """Decode steps of all levels; then what the device does in one of the smallest."""
    decoder = Decoder(served, job.most, graphs=job.graphs)
    for requests in job.levels:
        title = decode_key(job.name, requests, graphs=job.graphs)
        part.try_to(title, partial(_decode_level, job, decoder, served, requests), LEAST_SECONDS)
    # Last: what counts kernels may slow down the process that it is in.
    requests = min(job.levels)
    for distinct in (0, requests):
        title = f"{decode_key(job.name, requests, graphs=job.graphs)} of {distinct} tasks"
        watch = partial(_watch, decoder, part.device, served.mix(requests, distinct))
        part.try_to(title, watch, LEAST_SECONDS)


def _decode_level(job: Job, decoder: Decoder, served: ServedModel, requests: int) -> dict[str, Any]:
    """The rates and times of steps of so many requests, by number of tasks."""
    distinct, turns = job.levels[requests], Turns()
    for tasks in (*(0, *distinct) * ROUNDS, 0):
        with decoder.decoding(served.mix(requests, tasks)) as step:
            for _ in range(WARM_UP_STEPS):  # the first of a size is recorded
                step()
            median = statistics.median(seconds_of(step) for _ in range(job.sizes.steps))
        turns.add(str(tasks), requests / median)
    times = {tasks: round(1e3 * requests / rate, 3) for tasks, rate in turns.medians().items()}
    return {"ms_a_step": times, **compared(turns, distinct)}


def compared(turns: Turns, distinct: Sequence[int]) -> dict[str, Any]:
    """The tokens a second by number of tasks, and over those without tasks."""
    ratios = {of_base(tasks): turns.compare(str(tasks), "0").ratio for tasks in distinct}
    return {"tokens_per_second": turns.medians(), **ratios}


def _watch(
    decoder: Decoder, device: torch.device, tasks: Sequence[TaskVersion | None]
) -> dict[str, Any]:
    """What the device does in a decode step of these tasks' requests."""
    with decoder.decoding(tasks) as step:
        for _ in range(WARM_UP_STEPS):
            step()
        with watched(device) as work:
            for _ in range(WATCHED_STEPS):
                step()
    return work.a_step(DeviceWork(), WATCHED_STEPS)


def whole_completions(job: Job, part: Part, served: ServedModel) -> None:
    """Completions of all levels, in an engine with its thread."""

    async def run() -> None:
        engine = EmbeddedEngine(
            served.adapted, served.inventory, config_for(job.most, graphs=job.graphs)
        )
        await engine.start()
        for requests in job.levels:
            if part.left < LEAST_SECONDS:
                part.leave_out(end_to_end_key(job.name, requests), "no time left")
            else:
                figures = await _completions(job, engine, served, requests)
                part.add(end_to_end_key(job.name, requests), figures)
        await engine.stop()

    asyncio.run(run())


async def _completions(
    job: Job, engine: EmbeddedEngine, served: ServedModel, requests: int
) -> dict[str, Any]:
    """The rates of so many requests at once, by number of tasks, after a turn of each."""
    distinct, new = job.levels[requests], job.sizes.new_tokens
    each = 0, *distinct
    turns = Turns()
    for number, tasks in enumerate((*each, *each, 0)):
        answers = [answer(engine, PROMPT, new, task) for task in served.mix(requests, tasks)]
        rate = await tokens_per_second(answers, new)
        if number >= len(each):
            turns.add(str(tasks), rate)
    return compared(turns, distinct)


def _lora_layers(part: Part, slots: int) -> Callable[..., GatheredLoraLayer]:
    """What builds a layer of LoRAs in place of `LayerBuilder.build`."""

    def build(_: LayerBuilder, slices: Sequence[Slice]) -> GatheredLoraLayer:
        return GatheredLoraLayer(slices, slots, dtype_of(part), part.device)

    return build


def dtype_of(part: Part) -> torch.dtype:
    """The dtype of the model."""
    return torch.float32 if part.dry else torch.bfloat16


def measure(part: Part) -> None:
    """The part."""
    shape = TINY if part.dry else SHAPE_8B
    part.add("model", {"layers": shape.layers, "gigabytes": BYTES * shape.parameters / 1e9})
    started = [(job, Apart(part, job.key, partial(run_job, job))) for job in jobs(Sizes.of(part))]
    for job, process in started:
        process.run(job.least)


if __name__ == "__main__":
    run_as_part("engine", __doc__, measure)
