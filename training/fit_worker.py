"""A few rows to a router, in a process of its own: what `POST /v1/tasks/{name}/fit` runs.

Reads one JSON object from stdin (FitJob) and writes one JSON object a line to stdout, an event
each: `started`, `progress` (step, steps, loss), and at last `scored`, or `failed` with a message.
The router is then in the job's `out` file, with its scores in its metadata.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyrex.adapters.errors import DataError, PolyrexError
from polyrex.adapters.files.inventory import load_experts, read_inventory
from polyrex.adapters.files.router import RouterMetadata, write_router
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.adapters.model.base_model import load_base, load_tokenizer, resolve_base
from polyrex.adapters.model.routed_linear import RoutedLinear
from polyrex.training.data.batches import Example, encode_rows
from polyrex.training.data.tasks import Metric, Row, Task, prompt_of
from polyrex.training.evaluation.evaluate import Score, evaluate
from polyrex.training.loop.loop import StepRecord, current_commit

from .adapt import ADAPTATION, fit, starts_of
from .train import use_eager_attention

LOOP = replace(ADAPTATION, steps=24, batch_rows=8, warmup=3)
"""Eight looks at every one of 32 rows that are not held out."""

BUDGET = 5e11
"""Tokens of all steps, times the weights of the layers that they go back through: about half a
minute on one core. Plurals of nouns, of 14 tokens, may then be fitted on all 30 layers of a small
model, for 8 points more than on the upper ten; questions of 60 tokens on the upper twelve."""

NICENESS = 10
"""Serving comes first: of a core that the engine wants too, the worker gets about a tenth, beside
what the engine leaves. At 5, p99 between the tokens of running streams doubled (`make bench-fit`);
with `SCHED_IDLE` a fit beside a busy server would never end."""

THREADS = max(1, (os.cpu_count() or 1) // 4)
"""Few: threads that wait for each other do not go with engines that take the cores away."""

FEWEST_ROWS = 8
HELD_OUT_EVERY = 4


@dataclass(frozen=True)
class FitJob:
    """One task to fit; `rows` hold `input`, `answer` and, where there are any, `options`."""

    base: str
    inventory: str
    task: str
    instruction: str
    rows: list[dict[str, Any]]
    out: str
    dtype: str = "bfloat16"


def run_job(job: FitJob, emit: Callable[..., None]) -> None:
    """Fit, score on the rows held out, and write the router.

    Every fourth row is held out. Raises DataError where there are too few rows, or where they are
    of two kinds; FileError or SpecError where the inventory cannot be fitted to.
    """
    task = task_of(job)
    inventory = read_inventory(Path(job.inventory))
    path = resolve_base(job.base)
    base, tokenizer = load_base(path, getattr(torch, job.dtype)), load_tokenizer(path)
    adapted = load_experts(inventory, base)
    train = task.rows["train"]
    emit("started", rows=len(train), held_out=len(task.rows["valid"]), steps=LOOP.steps)
    use_eager_attention(base)

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
    write_router(Path(job.out), logits, inventory.spec, metadata)
    emit("scored", **scores)


def lower_layers(adapted: AdaptedModel, examples: Sequence[Example]) -> int:
    """How many decoder layers keep the routing that the task starts from, so that all steps
    together stay within BUDGET; two thirds at the most.

    None where one row of logits routes all layers, or where nothing above is adapted.
    """
    model: Any = adapted.model
    layers = getattr(model.base_model, "layers", ())
    if not layers or adapted.spec.granularity == "model":
        return 0
    tokens = LOOP.steps * LOOP.batch_rows * sum(map(len, examples)) / len(examples)
    weights = sum(parameter.numel() for parameter in layers[0].parameters())
    lower = len(layers) - int(BUDGET / (tokens * weights))
    lower = max(0, min(lower, 2 * len(layers) // 3))
    reached = any(isinstance(module, RoutedLinear) for module in layers[lower:].modules())
    return lower if reached else 0


def task_of(job: FitJob) -> Task:
    """The job's rows as a task: every fourth is held out, as its `valid` split."""
    rows = [Row(r["input"], r["answer"], tuple(r.get("options") or ()) or None) for r in job.rows]
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
    """What the base model and the fitted task score on the rows held out."""
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


def main() -> None:
    """Run the job on stdin; exits with 1 where it failed, which an event tells."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    os.nice(NICENESS)
    torch.set_num_threads(THREADS)
    try:
        run_job(FitJob(**json.loads(sys.stdin.read())), _emit)
    except PolyrexError as error:
        _emit("failed", message=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
