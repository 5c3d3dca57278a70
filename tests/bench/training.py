"""`make bench-train`: rows a second of training, beside PEFT's `poly` under transformers' Trainer.

The same base model in bfloat16, the same target modules, method (Poly), ranks, experts, rows, batch
size and optimiser. Each side trains on one pass over the same rows, in a process of its own, in
turns; ratios are of neighbours. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyrex.adapters.model.attach import attach, find_targets
from polyrex.adapters.model.base_model import DEFAULT_BASE, load_base, load_tokenizer, resolve_base
from polyrex.adapters.spec import AdapterSpec
from polyrex.training.data.batches import IGNORED, Example, encode_rows
from polyrex.training.data.tasks import load_tasks
from polyrex.training.loop.loop import LoopConfig, run, write_record
from polyrex.training.model.multi_task import MultiTaskModel
from polyrex.training.train import use_eager_attention

SPEC = AdapterSpec("poly", rank=16, experts=8)
BATCH_ROWS = 16
WARM_UP = 3  # steps that are not timed
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Row = dict[str, Any]


def sample(data: Path, rows: int) -> tuple[list[Example], int]:
    """Train rows of all tasks of a folder, the same every time; and the number of tasks."""
    tokenizer = load_tokenizer(resolve_base(DEFAULT_BASE))
    tasks = load_tasks(data)
    examples = [
        example
        for index, task in enumerate(tasks)
        for example in encode_rows(tokenizer, task.instruction, task.rows["train"], task=index)
    ]
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))
    return [examples[i] for i in order[:rows].tolist()], len(tasks)


def train_polyrex(examples: Sequence[Example], tasks: int) -> list[float]:
    """Seconds of each step."""
    base = load_base(resolve_base(DEFAULT_BASE), torch.bfloat16)
    use_eager_attention(base)
    model = MultiTaskModel(attach(base, SPEC, find_targets(base)), tasks, seed=0)
    loop = LoopConfig(steps=len(examples) // BATCH_ROWS, batch_rows=BATCH_ROWS)
    clock = StepClock()
    run(model, model.parameter_groups(), examples, loop, pad=0, progress=lambda _: clock.tick())
    return clock.seconds


def train_peft(examples: Sequence[Example], tasks: int, **arguments: Any) -> list[float]:
    """Seconds of each step, under transformers' Trainer with `arguments` changed."""
    from peft import PolyConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    config = PolyConfig(
        task_type="CAUSAL_LM",
        r=SPEC.rank,
        n_tasks=tasks,
        n_skills=SPEC.experts,
        target_modules=PROJECTIONS,
    )
    model = get_peft_model(load_base(resolve_base(DEFAULT_BASE), torch.bfloat16), config)
    clock = StepClock()

    class Ticking(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH_ROWS,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,  # it would take the tasks away
            **arguments,
        )
        rows = [peft_row(example) for example in examples]
        trainer = Trainer(
            model,
            settings,
            train_dataset=rows,
            data_collator=collate_padded,
            callbacks=[Ticking()],
        )
        trainer.train()
    return clock.seconds


def peft_row(example: Example) -> Row:
    """A row as Trainer's users prepare it: labels on the answer alone."""
    tokens = [*example.prompt, *example.answer]
    labels = [IGNORED] * len(example.prompt) + list(example.answer)
    return {"input_ids": tokens, "labels": labels, "task_ids": example.task}


def collate_padded(rows: Sequence[Row]) -> dict[str, Tensor]:
    """A batch as wide as its longest row, with an attention mask."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(values: Callable[[Row], list[int]], fill: int) -> Tensor:
        return torch.tensor([values(r) + [fill] * (width - len(values(r))) for r in rows])

    return {
        "input_ids": padded(lambda row: row["input_ids"], 0),
        "labels": padded(lambda row: row["labels"], IGNORED),
        "attention_mask": padded(lambda row: [1] * len(row["input_ids"]), 0),
        "task_ids": torch.tensor([row["task_ids"] for row in rows]),
    }


class StepClock:
    """The time between the ends of steps."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = time.perf_counter()

    def tick(self) -> None:
        """A step has ended."""
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


SIDES: dict[str, Callable[[Sequence[Example], int], list[float]]] = {
    "polyrex": train_polyrex,
    "peft": train_peft,
    "peft_by_length": lambda e, n: train_peft(e, n, train_sampling_strategy="group_by_length"),
}


def measure_side(side: str, data: Path, rows: int) -> dict[str, float]:
    """One side, in this process: rows a second after the first steps, and its memory."""
    examples, tasks = sample(data, rows)
    seconds = SIDES[side](examples, tasks)[WARM_UP:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "rows_per_second": round(BATCH_ROWS * len(seconds) / sum(seconds), 3),
        "peak_memory_mb": round(peak / 1024),
    }


def measure(data: Path, rows: int, rounds: int) -> dict[str, Any]:
    """All sides in turns, each in a process of its own."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES:
            command = [sys.executable, "-m", "bench.training", "--side", side]
            command += ["--data", str(data), "--rows", str(rows)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number}: {side} {found[side][-1]}", flush=True)

    def ratio(over: str, under: str, key: str) -> float:
        pairs = zip(found[over], found[under], strict=True)
        return round(statistics.median(a[key] / b[key] for a, b in pairs), 3)

    return {
        "polyrex_vs_peft": ratio("polyrex", "peft", "rows_per_second"),
        "polyrex_vs_peft_by_length": ratio("polyrex", "peft_by_length", "rows_per_second"),
        "memory_vs_peft": ratio("polyrex", "peft", "peak_memory_mb"),
        "sides": {
            side: {key: statistics.median(each[key] for each in own) for key in own[0]}
            for side, own in found.items()
        },
        "rows": rows,
        "rounds": rounds,
        "batch_rows": BATCH_ROWS,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """The command behind `make bench-train`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with manifest.json")
    parser.add_argument("--rows", type=int, default=480)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help="only this one, in this process")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure_side(options.side, options.data, options.rows)))
        return
    result = measure(options.data, options.rows, options.rounds)
    if options.out:
        write_record(options.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
