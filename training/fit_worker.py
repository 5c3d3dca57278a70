"""Fits a router to a few rows, in the process that `POST /v1/tasks/{name}/fit` starts.

Reads a job (FitJob) as one line of JSON from stdin, and writes events to stdout, one JSON object a
line: `started` (with the device), `progress` (step, steps, loss), and finally `scored`, or `failed`
with a message.
The router is then in the job's `out` file, with its scores in the metadata.

Stdin stays open as long as anybody wants the result: the worker ends when it is closed.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyrex.adapters.errors import DataError, PolyrexError
from polyrex.adapters.files.inventory import load_experts, read_inventory
from polyrex.adapters.files.router import RouterMetadata, router_bytes
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.adapters.model.base_model import torch_dtype
from polyrex.adapters.model.devices import device_name
from polyrex.adapters.model.routed_linear import RoutedLinear
from polyrex.adapters.rows import parse_row
from polyrex.training.data.batches import Example, encode_rows
from polyrex.training.data.tasks import Metric, Task, prompt_of
from polyrex.training.evaluation.evaluate import Score, evaluate
from polyrex.training.loop.run import StepRecord
from polyrex.training.model.beside import device_beside
from polyrex.training.model.loading import load_for_training

from .adapt import ADAPTATION, fit, starts_of
from .records import current_commit

LOOP = replace(ADAPTATION, steps=24, batch_rows=8, warmup=3)
"""Of 32 rows, 24 are trained on: each is seen eight times."""

BUDGET = 5e11
"""The limit on tokens of all steps times weights of the layers that gradients pass through: about
half a minute on one core. With it, plurals of nouns (14 tokens a row) are fitted on all 30 layers
of a small model, which gains 8 points over the upper ten; questions of 60 tokens are fitted on the
upper twelve."""

NICENESS = 10
"""Serving comes first: on a core that the engine wants too, the worker gets about a tenth of the
time, and whatever the engine leaves idle. At 5, the p99 time between tokens of running streams
doubled (`make bench-fit`); with `SCHED_IDLE`, a fit beside a busy server would never end."""

THREADS = max(1, (os.cpu_count() or 1) // 4)
"""Few: threads that wait for each other are slow when an engine takes their cores away."""

FEWEST_ROWS = 8
HELD_OUT_EVERY = 4


@dataclass(frozen=True)
class FitJob:
    """A task to fit; the schema of its rows is in adapters/rows.py."""

    base: str
    inventory: str
    task: str
    instruction: str
    rows: list[dict[str, Any]]
    out: str
    dtype: str = "bfloat16"
    device: str = "auto"


def run_job(job: FitJob, emit: Callable[..., None]) -> None:
    """Fit a router, score it on the held-out rows (every fourth), and write it.

    Raises DataError if there are too few rows, or if only some have options; FileError or SpecError
    if the inventory cannot be used; DeviceError if the device has no room.
    """
    task = task_of(job)
    inventory = read_inventory(Path(job.inventory))
    device = device_beside(job.device, job.base, torch_dtype(job.dtype))
    base, tokenizer = load_for_training(job.base, job.dtype, device)
    adapted = load_experts(inventory, base)
    train = task.rows["train"]
    held_out, place = len(task.rows["valid"]), device_name(device)
    emit("started", rows=len(train), held_out=held_out, steps=LOOP.steps, device=place)

    def progress(record: StepRecord) -> None:
        emit("progress", step=record.step + 1, steps=LOOP.steps, loss=round(record.loss, 4))

    examples = encode_rows(tokenizer, task.instruction, train)
    start, logits, _ = fit(
        adapted,
        examples,
        tokenizer.eos_token_id,
        LOOP,
        starts=starts_of(inventory, [prompt_of(task.instruction, row) for row in train]),
        above=lower_layers(adapted, examples),
        progress=progress,
    )
    scores = held_out_scores(adapted, tokenizer, task, logits)
    metadata = RouterMetadata(
        inventory_sha256=inventory.sha256,
        task=job.task,
        description=job.instruction,
        provenance={
            "trained": "fitted by the server (routing)",
            "rows": len(train),
            "started_from": start,
            "commit": current_commit(),
            "example_prompt": prompt_of(task.instruction, train[0]),
        },
        scores={"held_out": scores},
    )
    # Not by way of another name: it may be a descriptor of a file that has no name.
    Path(job.out).write_bytes(router_bytes(logits, inventory.spec, metadata))
    emit("scored", **scores)


def lower_layers(adapted: AdaptedModel, examples: Sequence[Example]) -> int:
    """The number of decoder layers that keep the task's initial routing, so that the whole run
    stays within BUDGET; at most two thirds.

    0 if one row of logits routes all layers, if no layer above these is adapted, or on a card,
    where all layers take seconds.
    """
    model: Any = adapted.model
    layers = getattr(model.base_model, "layers", ())
    on_card = adapted.device.type == "cuda"
    if on_card or not layers or adapted.spec.granularity == "model":
        return 0
    tokens = LOOP.steps * LOOP.batch_rows * sum(map(len, examples)) / len(examples)
    weights = sum(parameter.numel() for parameter in layers[0].parameters())
    lower = len(layers) - int(BUDGET / (tokens * weights))
    lower = max(0, min(lower, 2 * len(layers) // 3))
    reached = any(isinstance(module, RoutedLinear) for module in layers[lower:].modules())
    return lower if reached else 0


def task_of(job: FitJob) -> Task:
    """The job's rows as a task, with every fourth row held out as the `valid` split."""
    rows = [parse_row(row, f"{job.task}: rows[{i}]") for i, row in enumerate(job.rows)]
    if len(rows) < FEWEST_ROWS:
        raise DataError(f"{job.task}: at least {FEWEST_ROWS} rows are needed, got {len(rows)}")
    if len({row.options is None for row in rows}) != 1:
        raise DataError(f"{job.task}: either every row has options, or none")
    metric: Metric = "exact_match" if rows[0].options is None else "rank_classification_accuracy"
    held_out = rows[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    train = [row for i, row in enumerate(rows, start=1) if i % HELD_OUT_EVERY]
    splits: dict[Any, Any] = {"train": tuple(train), "valid": tuple(held_out), "test": ()}
    return Task(job.task, job.instruction, metric, "", "", "", splits)


def held_out_scores(
    adapted: AdaptedModel, tokenizer: Any, task: Task, logits: Tensor
) -> dict[str, Any]:
    """The scores of the base model and of the fitted task on the held-out rows."""
    adapted.prepare(adapted.model.dtype)  # type: ignore[arg-type]
    before = evaluate(adapted, tokenizer, task, None, split="valid")
    after = evaluate(adapted, tokenizer, task, logits, split="valid")
    return {"metric": after.metric, "rows": after.rows, **_values(before, after)}


def _values(before: Score, after: Score) -> dict[str, float]:
    return {
        "base": round(before.value, 4),
        "adapted": round(after.value, 4),
        "standard_error": round(after.standard_error, 4),
    }


def _emit(event: str, **values: Any) -> None:
    print(json.dumps({"event": event, **values}), flush=True)


def _end_with_stdin() -> None:
    """End the process when stdin is closed, as it is when the server dies, however it dies."""
    while os.read(0, 1):
        pass
    os._exit(1)


def main() -> None:
    """Run the job on stdin; a job that fails emits `failed` and exits with status 1."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    os.nice(NICENESS)
    torch.set_num_threads(THREADS)
    job = FitJob(**json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        run_job(job, _emit)
    except PolyrexError as error:
        _emit("failed", message=str(error))
        sys.exit(1)
    except torch.OutOfMemoryError:
        _emit("failed", message="fitting takes more of the card than the engine leaves free")
        sys.exit(1)


if __name__ == "__main__":
    main()
