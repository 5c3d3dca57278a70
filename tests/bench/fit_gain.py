"""`make fit-gain`: how much accuracy the server's short fit gives up against a full adaptation.

Each task is fitted to the same rows twice: as `POST /v1/tasks/{name}/fit` does, which holds out a
quarter of them, and as `polyrex adapt` does. Both routers and the base model are scored on the
task's test rows. Neither way may start from the router of a held_out task. The last line is one
JSON document.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from polyrex.adapters.files.bundle import INVENTORY, ROUTERS, Bundle, read_router_file
from polyrex.adapters.files.inventory import load_experts, read_inventory
from polyrex.adapters.model.base_model import DEFAULT_BASE, load_base, load_tokenizer, resolve_base
from polyrex.training.adapt import ADAPTATION, AdaptConfig, adapt, few_shot_rows
from polyrex.training.data.tasks import Task, load_tasks
from polyrex.training.evaluation.evaluate import Score, evaluate
from polyrex.training.fit_worker import FitJob, run_job
from polyrex.training.records import current_commit

from .harness import command_line, report, seconds_of

ROWS = 32
TASKS = ("plural", "epistemic", "wic_wn")


def without_held_out(inventory: Path, data: Path, folder: Path) -> Path:
    """A copy of an inventory in `folder`, with only the routers of held_in tasks beside it."""
    bundle, copy = Bundle.read(inventory), folder / INVENTORY
    (folder / ROUTERS).mkdir(parents=True)
    copy.symlink_to(inventory.resolve())
    for task in load_tasks(data, role="held_in"):
        router = bundle.router_path(task.name)
        (folder / ROUTERS / router.name).symlink_to(router.resolve())
    return copy


def fitted(task: Task, inventory: Path, folder: Path) -> tuple[Path, float]:
    """The router that the server would register, and the seconds that fitting took."""
    rows = [asdict(row) for row in few_shot_rows(task.rows["train"], ROWS, 0)]
    out = folder / f"{task.name}-fitted.safetensors"
    job = FitJob(DEFAULT_BASE, str(inventory), task.name, task.instruction, rows, str(out))
    return out, seconds_of(run_job, job, lambda *_, **__: None)


def adapted(task: Task, data: Path, inventory: Path, folder: Path) -> tuple[Path, float]:
    """The router that `polyrex adapt` writes, and the seconds that adapting took."""
    started = time.perf_counter()
    out = adapt(AdaptConfig(data, task.name, inventory, folder, rows=ROWS, loop=ADAPTATION))
    return out, time.perf_counter() - started


def scores(task: Task, inventory: Path, routers: Sequence[Path | None]) -> list[Score]:
    """The score of each router on the task's test rows; None stands for the base model."""
    read, path = read_inventory(inventory), resolve_base(DEFAULT_BASE)
    model = load_experts(read, load_base(path, torch.bfloat16))
    model.prepare(torch.bfloat16)
    found = []
    for router in routers:
        logits = None if router is None else read_router_file(router, read).logits
        found.append(evaluate(model, load_tokenizer(path), task, logits))
    return found


def gains(data: Path, inventory: Path, names: Sequence[str], test_rows: int) -> dict[str, Any]:
    """The scores of both ways, task by task, and their mean gains over the base model."""
    by_task: dict[str, dict[str, float]] = {}
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
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with manifest.json")
    parser.add_argument("--inventory", type=Path, required=True, help="with its routers beside it")
    parser.add_argument("--task", action="append", help=f"default: {', '.join(TASKS)}")
    parser.add_argument("--test-rows", type=int, default=200, help="of each task, at most")
    options = parser.parse_args()
    names = options.task or TASKS
    report(gains(options.data, options.inventory, names, options.test_rows), options.out)


if __name__ == "__main__":
    main()
