"""`make fit-gain`: what the server's short fit gives up against adapting at full length.

Each task is fitted from the same rows as `POST /v1/tasks/{name}/fit` does it, which holds a quarter
of them out, and as `polyrex adapt` does it; both routers, and the base model, are scored on the
task's test rows. No router of a held_out task is there to start from. The last line is one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyrex.adapters.files.inventory import load_experts, read_inventory
from polyrex.adapters.files.router import read_router
from polyrex.adapters.model.base_model import DEFAULT_BASE, load_base, load_tokenizer, resolve_base
from polyrex.training.adapt import ADAPTATION, AdaptConfig, adapt, few_shot_rows
from polyrex.training.data.tasks import Task, load_tasks
from polyrex.training.evaluation.evaluate import Score, evaluate
from polyrex.training.fit_worker import FitJob, run_job
from polyrex.training.loop.loop import current_commit, write_record

ROWS = 32
TASKS = ("plural", "epistemic", "wic_wn")
Scored = dict[str, float]


def without_held_out(inventory: Path, data: Path, folder: Path) -> Path:
    """A copy of an inventory in `folder` with the routers of held_in tasks alone beside it."""
    (folder / "routers").mkdir(parents=True)
    copy = folder / inventory.name
    copy.symlink_to(inventory.resolve())
    for task in load_tasks(data, role="held_in"):
        router = inventory.parent / "routers" / f"{task.name}.safetensors"
        (folder / "routers" / router.name).symlink_to(router.resolve())
    return copy


def fitted(task: Task, inventory: Path, folder: Path) -> tuple[Path, float]:
    """The router that the server would register, and the seconds that it took."""
    rows = [asdict(row) for row in few_shot_rows(task.rows["train"], ROWS, 0)]
    out = folder / f"{task.name}-fitted.safetensors"
    started = time.perf_counter()
    job = FitJob(DEFAULT_BASE, str(inventory), task.name, task.instruction, rows, str(out))
    run_job(job, lambda *_, **__: None)
    return out, time.perf_counter() - started


def adapted(task: Task, data: Path, inventory: Path, folder: Path) -> tuple[Path, float]:
    """The router of `polyrex adapt`, and the seconds that it took."""
    started = time.perf_counter()
    out = adapt(AdaptConfig(data, task.name, inventory, folder, rows=ROWS, loop=ADAPTATION))
    return out, time.perf_counter() - started


def scores(task: Task, inventory: Path, routers: Sequence[Path | None]) -> list[Score]:
    """Of each router, or of the base model, on the task's test rows."""
    read, path = read_inventory(inventory), resolve_base(DEFAULT_BASE)
    model = load_experts(read, load_base(path, torch.bfloat16))
    model.prepare(torch.bfloat16)
    found = []
    for router in routers:
        logits: Tensor | None = None
        if router is not None:
            logits = read_router(router.read_bytes(), str(router), read).logits
        found.append(evaluate(model, load_tokenizer(path), task, logits))
    return found


def measure(data: Path, inventory: Path, names: Sequence[str], test_rows: int) -> dict[str, Any]:
    """Both ways for each task, one after the other."""
    by_task: dict[str, Scored] = {}
    for task in load_tasks(data, names):
        with tempfile.TemporaryDirectory(prefix="polyrex-fit-gain-") as name:
            folder = Path(name)
            copy = without_held_out(inventory, data, folder / "inventory")
            short, short_seconds = fitted(task, copy, folder)
            long, long_seconds = adapted(task, data, copy, folder)
            test = replace(task, rows=task.rows | {"test": task.rows["test"][:test_rows]})
            base, fit, full = scores(test, copy, (None, short, long))
        by_task[task.name] = {
            "base": round(base.value, 4),
            "fitted": round(fit.value, 4),
            "adapted": round(full.value, 4),
            "standard_error": round(fit.standard_error, 4),
            "seconds_fitted": round(short_seconds, 1),
            "seconds_adapted": round(long_seconds, 1),
        }
        print(task.name, by_task[task.name], flush=True)

    def gain(kind: str) -> float:
        return statistics.mean(each[kind] - each["base"] for each in by_task.values())

    return {
        "gain_fitted": round(gain("fitted"), 4),
        "gain_adapted": round(gain("adapted"), 4),
        "tasks": by_task,
        "rows": ROWS,
        "test_rows": test_rows,
        "commit": current_commit(),
    }


def main() -> None:
    """The command behind `make fit-gain`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with manifest.json")
    parser.add_argument("--inventory", type=Path, required=True, help="its routers lie beside it")
    parser.add_argument("--task", action="append", help=f"instead of {', '.join(TASKS)}")
    parser.add_argument("--test-rows", type=int, default=200, help="at most, of each task")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    options = parser.parse_args()
    result = measure(options.data, options.inventory, options.task or TASKS, options.test_rows)
    write_record(options.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
