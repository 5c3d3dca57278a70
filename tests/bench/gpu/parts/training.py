"""Part 4: training steps of every method, beside PEFT's LoRA and poly, at Llama-3.1-8B's shape.

All train the same frozen random model in bfloat16, on the same batches of 16 rows of 128 tokens,
with AdamW (fused, on a GPU), one after another in turns. PEFT's side is a plain loop, without the
overhead of a Trainer. A ratio is that of one turn over the mean of the nearest turns of PEFT's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle, pairwise
from typing import Any

import torch
from torch import nn

from bench.cases import EXPERTS, MAIN, OTHERS, RANK
from bench.gpu.measuring.profiling import watched
from bench.gpu.part import Part, run_as_part
from bench.gpu.subjects.random_model import SHAPE_8B, TINY, attach_random, detach, random_llama
from bench.gpu.workspace import is_installed
from bench.harness import Turns
from polyrex.adapters.model.attach import find_targets
from polyrex.adapters.spec import AdapterSpec
from polyrex.training.data.batches import Example
from polyrex.training.loop.run import LoopConfig, StepRecord, run
from polyrex.training.model.multi_task import MultiTaskModel

ROWS, TASKS = 16, 8
IGNORED = -100  # a label that is not trained on
PEFT = ("peft poly", "peft lora")
WARM_UP, TIMED = 3, 5
"""Steps that are not timed, and steps that are; a few more are watched."""
LEAST_SECONDS = 20.0
"""Time that one contender may need: the slowest, PEFT's poly, takes 15 on an H100."""


@dataclass(frozen=True)
class Setting:
    """What all contenders train."""

    model: nn.Module
    device: torch.device
    vocabulary: int
    tokens: int

    def examples(self) -> list[Example]:
        """The rows of all steps, the same every time; an answer is an eighth of a row."""
        generator = torch.Generator().manual_seed(0)
        rows = ROWS * (WARM_UP + TIMED)
        drawn = torch.randint(1, self.vocabulary, (rows, self.tokens), generator=generator)
        cut = self.tokens * 7 // 8
        return [
            Example(number % TASKS, tuple(row[:cut]), tuple(row[cut:]))
            for number, row in enumerate(drawn.tolist())
        ]


class Clock:
    """The ends of a contender's steps, and what the device does in one of them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ends: list[float] = []
        self._work: dict[str, float] = {}

    def note(self, _: StepRecord | None = None) -> None:
        """A step has ended on the host; wait until it has on the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self._ends.append(time.perf_counter())

    def watch(self, steps: Callable[[int], object]) -> None:
        """Count the kernels of a step, by runs of one step and of two."""
        works = []
        for count in (1, 2):
            with watched(self._device) as work:
                steps(count)
            works.append(work)
        self._work = works[1].a_step(works[0], 1)

    def figures(self) -> dict[str, float]:
        """Rows a second by the median step, what one step does, and the peak of memory."""
        ends = self._ends[WARM_UP - 1 :]
        median = statistics.median(b - a for a, b in pairwise(ends))
        found = {"rows_per_second": round(ROWS / median, 2), **self._work}
        if self._device.type == "cuda":
            found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        return found


def train_polyrex(setting: Setting, spec: AdapterSpec) -> dict[str, float]:
    """A method's steps, in polyrex's own loop."""
    adapted = attach_random(setting.model, spec)
    clock, examples = Clock(setting.device), setting.examples()
    try:
        model = MultiTaskModel(adapted, TASKS, seed=0).to(setting.device)
        groups = model.parameter_groups()

        def steps(count: int, progress: Callable[[StepRecord], None]) -> None:
            loop = LoopConfig(steps=count, batch_rows=ROWS, warmup=1)
            run(model, groups, examples, loop, pad=0, progress=progress)

        steps(WARM_UP + TIMED, clock.note)
        clock.watch(lambda count: steps(count, lambda _: None))
        return clock.figures()
    finally:
        detach(adapted)


def train_peft(setting: Setting, kind: str) -> dict[str, float]:
    """Steps of PEFT's `poly` or `lora` with the rank and the experts that polyrex's has."""
    from peft import LoraConfig, PeftConfig, PolyConfig, get_peft_model

    targets = [target.name for target in find_targets(setting.model)]
    shared: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": RANK, "target_modules": targets}
    config: PeftConfig
    if kind == "peft poly":
        config = PolyConfig(n_tasks=TASKS, n_skills=EXPERTS, **shared)
    else:
        config = LoraConfig(lora_alpha=RANK, **shared)
    model: Any = get_peft_model(setting.model, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-3, fused=setting.device.type == "cuda")
    clock, batches = Clock(setting.device), cycle(_peft_batches(setting, kind))

    def steps(count: int, progress: Callable[[], None]) -> None:
        for _ in range(count):
            model(**next(batches)).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            progress()

    try:
        steps(WARM_UP + TIMED, clock.note)
        clock.watch(lambda count: steps(count, lambda: None))
        return clock.figures()
    finally:
        model.unload()
        setting.model.eval().requires_grad_(False)


def _peft_batches(setting: Setting, kind: str) -> list[dict[str, torch.Tensor]]:
    """The same rows as polyrex trains on; labels on the answers alone."""
    found = []
    examples = setting.examples()
    for begin in range(0, len(examples), ROWS):
        rows = examples[begin : begin + ROWS]
        labels = [[IGNORED] * len(row.prompt) + [*row.answer] for row in rows]
        batch = {
            "input_ids": torch.tensor([[*row.prompt, *row.answer] for row in rows]),
            "labels": torch.tensor(labels),
        }
        if kind == "peft poly":
            batch["task_ids"] = torch.tensor([row.task for row in rows])
        found.append({name: tensor.to(setting.device) for name, tensor in batch.items()})
    return found


def contenders(dry: bool) -> list[str]:
    """The names of what is trained, in turn: first the pair that a goal is set for, twice."""
    names = ["poly", "peft poly"] * 2 + ["lora", "peft lora", *MAIN]
    names += [name for name in OTHERS if name not in names]
    if dry:
        names = ["poly", "peft poly", "peft lora"]
    if not is_installed("peft"):
        names = list(dict.fromkeys(name for name in names if name not in PEFT))
    return names


def measure(part: Part) -> None:
    """The part."""
    shape, dtype = (TINY, torch.float32) if part.dry else (SHAPE_8B, torch.bfloat16)
    model = random_llama(shape, part.device, dtype)
    setting = Setting(model, part.device, shape.vocabulary, 16 if part.dry else 128)
    part.add("model", {"layers": shape.layers, "rows": ROWS, "tokens": setting.tokens})
    if not is_installed("peft"):
        part.leave_out("peft", "PEFT is neither in the bundle nor installed")
    turns = Turns()
    for number, name in enumerate(contenders(part.dry), start=1):
        part.try_to(f"turn {number}, {name}", partial(_turn, turns, name, setting), LEAST_SECONDS)
        part.add("compared", compared(turns))


def _turn(turns: Turns, name: str, setting: Setting) -> dict[str, float]:
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if name in PEFT:
        found = train_peft(setting, name)
    else:
        found = train_polyrex(setting, {**OTHERS, **MAIN}[name])
    turns.add(name, found["rows_per_second"])
    return found


def compared(turns: Turns) -> dict[str, dict[str, float]]:
    """Every method's rows a second, over those of PEFT's poly and LoRA."""
    found: dict[str, dict[str, float]] = {}
    for name, rate in turns.medians().items():
        found[name] = {"rows_per_second": rate}
        for other in PEFT:
            if other in turns.figures and other != name:
                found[name][f"of_{other.replace(' ', '_')}"] = turns.compare(name, other).ratio
    return found


if __name__ == "__main__":
    run_as_part("training", __doc__, measure)
