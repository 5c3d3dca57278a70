"""`make bench-train`: the speed of training, compared with PEFT's `poly` under Trainer.

Both train the same base model in bfloat16, with the same target modules, method (Poly), rank,
experts, rows, batch size and optimiser. Each side makes one pass over the rows, in a process of its
own, in turns; a ratio is the median over neighbouring turns. The last line is one JSON document.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from polyrex.adapters.model.attach import attach, find_targets
from polyrex.adapters.model.base_model import DEFAULT_BASE, load_base, load_tokenizer, resolve_base
from polyrex.training.data.batches import Example, encode_rows
from polyrex.training.data.tasks import load_tasks
from polyrex.training.loop.run import LoopConfig, StepRecord, run
from polyrex.training.model.loading import use_eager_attention
from polyrex.training.model.multi_task import MultiTaskModel

from .cases import OTHERS
from .harness import Turns, command_line, report

SPEC = OTHERS["poly"]
BATCH_ROWS = 16
WARM_UP = 3  # steps that are not timed
IGNORED = -100  # a label that is not trained on


def sample(data: Path, rows: int) -> tuple[list[Example], int]:
    """The same train rows of all tasks of a folder every time, and the number of tasks."""
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
    """Train with polyrex; the times at which steps ended."""
    base = load_base(resolve_base(DEFAULT_BASE), torch.bfloat16)
    use_eager_attention(base)
    model = MultiTaskModel(attach(base, SPEC, find_targets(base)), tasks, seed=0)
    loop = LoopConfig(steps=len(examples) // BATCH_ROWS, batch_rows=BATCH_ROWS)
    ends: list[float] = []

    def note_end(_: StepRecord) -> None:
        ends.append(time.perf_counter())

    run(model, model.parameter_groups(), examples, loop, pad=0, progress=note_end)
    return ends


def train_peft(examples: Sequence[Example], tasks: int, **arguments: Any) -> list[float]:
    """Train with transformers' Trainer and these `arguments`; the times at which steps ended."""
    from peft import PolyConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    path = resolve_base(DEFAULT_BASE)
    base = load_base(path, torch.bfloat16)
    config = PolyConfig(
        task_type="CAUSAL_LM",
        r=SPEC.rank,
        n_tasks=tasks,
        n_skills=SPEC.experts,
        target_modules=[target.name for target in find_targets(base)],
    )
    ends: list[float] = []

    class NoteEnds(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH_ROWS,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,  # would drop the tasks
            **arguments,
        )
        Trainer(
            get_peft_model(base, config),
            settings,
            train_dataset=[peft_row(example) for example in examples],
            data_collator=DataCollatorForSeq2Seq(load_tokenizer(path), label_pad_token_id=IGNORED),
            callbacks=[NoteEnds()],
        ).train()
    return ends


def peft_row(example: Example) -> dict[str, Any]:
    """A row as Trainer's users prepare it: with labels on the answer alone."""
    tokens = [*example.prompt, *example.answer]
    labels = [IGNORED] * len(example.prompt) + list(example.answer)
    return {"input_ids": tokens, "labels": labels, "task_ids": example.task}


SIDES: dict[str, Callable[[Sequence[Example], int], list[float]]] = {
    "polyrex": train_polyrex,
    "peft": train_peft,
    "peft_by_length": lambda e, n: train_peft(e, n, train_sampling_strategy="group_by_length"),
}


def train_side(side: str, data: Path, rows: int) -> dict[str, float]:
    """Train one side in this process: rows a second after the first steps, and peak memory."""
    examples, tasks = sample(data, rows)
    ends = SIDES[side](examples, tasks)[WARM_UP - 1 :]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "rows_per_second": round(BATCH_ROWS * (len(ends) - 1) / (ends[-1] - ends[0]), 3),
        "peak_memory_mb": round(peak / 1024),
    }


def training_speed(data: Path, rows: int, rounds: int) -> dict[str, Any]:
    """All sides in turns, each in a process of its own."""
    measured = {"rows_per_second": Turns(), "peak_memory_mb": Turns()}
    for number in range(rounds):
        for side in SIDES:
            command = [sys.executable, "-m", "bench.training", "--side", side]
            command += ["--data", str(data), "--rows", str(rows)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            for key, turns in measured.items():
                turns.add(side, found[key])
            print(f"round {number}: {side} {found}", flush=True)
    speed, memory = measured.values()
    return {
        "polyrex_vs_peft": speed.compare("polyrex", "peft").ratio,
        "polyrex_vs_peft_by_length": speed.compare("polyrex", "peft_by_length").ratio,
        "memory_vs_peft": memory.compare("polyrex", "peft").ratio,
        "sides": {
            side: {key: turns.medians(3)[side] for key, turns in measured.items()} for side in SIDES
        },
        "rows": rows,
        "rounds": rounds,
        "batch_rows": BATCH_ROWS,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """The command behind `make bench-train`."""
    parser = command_line(__doc__, rounds=3)
    parser.add_argument("--data", type=Path, required=True, help="folder with manifest.json")
    parser.add_argument("--rows", type=int, default=480, help="default: %(default)s")
    parser.add_argument("--side", choices=SIDES, help="train only this one, in this process")
    options = parser.parse_args()
    if options.side:
        report(train_side(options.side, options.data, options.rows), options.out)
    else:
        report(training_speed(options.data, options.rows, options.rounds), options.out)


if __name__ == "__main__":
    main()
