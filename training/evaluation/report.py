"""Base and adapted scores of many tasks, as JSON and as a Markdown table."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from polyrex.adapters.errors import DataError
from polyrex.adapters.files.inventory import load_experts, read_inventory
from polyrex.adapters.model.base_model import load_base, load_tokenizer, resolve_base
from polyrex.training.adapt import neighbours
from polyrex.training.data.tasks import Split, load_tasks
from polyrex.training.loop.loop import current_commit, write_record

from .evaluate import Score, evaluate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskReport:
    """One task's scores, by the base model alone and under its router."""

    task: str
    role: str
    base: Score
    adapted: Score

    @property
    def gain(self) -> float:
        """Adapted minus base, a share."""
        return self.adapted.value - self.base.value

    @property
    def improved(self) -> bool:
        """By more than two standard errors of the difference, taken as independent."""
        return self.gain > 2 * math.hypot(self.base.standard_error, self.adapted.standard_error)


def evaluate_tasks(
    data: Path,
    inventory: Path,
    out: Path,
    *,
    base: str,
    tasks: Sequence[str] | None = None,
    split: Split = "test",
    dtype: str = "bfloat16",
) -> list[TaskReport]:
    """Score every task that has a router beside the inventory, or those named; write `out` (JSON).

    Routers without rows in the data folder are left out, with a warning and a place in the record.
    Scores of the base model do not depend on the inventory: those that `out` holds already, for
    the same split and number of rows, are kept. Raises DataError for a task without a router.
    """
    read = read_inventory(inventory)
    routers = neighbours(read)
    missing = sorted(set(tasks or ()) - set(routers))
    if missing:
        raise DataError(f"{inventory.parent}/routers: no router for {', '.join(missing)}")
    there = {task.name for task in load_tasks(data)}
    without_rows = sorted(set(routers) - there) if tasks is None else []
    if without_rows:
        logger.warning("%s has no rows for %s: not scored", data, ", ".join(without_rows))
    chosen = load_tasks(data, tasks or sorted(there & set(routers)))
    path = resolve_base(base)
    tokenizer = load_tokenizer(path)
    adapted = load_experts(read, load_base(path, getattr(torch, dtype)))
    adapted.prepare(getattr(torch, dtype))
    known = _known_base_scores(out, split)
    reports = []
    with Progress() as progress:
        for task in progress.track(chosen, description="evaluating"):
            before = known.get(task.name)
            if before is None or before.rows != len(task.rows[split]):
                before = evaluate(adapted, tokenizer, task, None, split=split)
            after = evaluate(adapted, tokenizer, task, routers[task.name], split=split)
            reports.append(TaskReport(task.name, task.role, before, after))
            logger.info("%s: %.3f -> %.3f", task.name, before.value, after.value)
            record = {
                "inventory_sha256": read.sha256,
                "split": split,
                "dtype": dtype,
                "without_rows": without_rows,
                "commit": current_commit(),
                "summary": summary(reports),
                "tasks": {r.task: _entry(r) for r in reports},
            }
            write_record(out, record)
    _add_to_run(inventory.with_name("record.json"), split, summary(reports))
    return reports


def _add_to_run(path: Path, split: Split, scores: dict[str, Any]) -> None:
    """Note the scores in the record of the run that made the inventory, where it lies beside it."""
    if path.exists():
        record = json.loads(path.read_text())
        write_record(path, record | {"scores": record.get("scores", {}) | {split: scores}})


def _known_base_scores(out: Path, split: Split) -> dict[str, Score]:
    if not out.exists():
        return {}
    found = json.loads(out.read_text())
    if found["split"] != split:
        return {}
    return {
        name: Score(entry["metric"], entry["rows"], entry["base"])
        for name, entry in found["tasks"].items()
    }


def _entry(report: TaskReport) -> dict[str, Any]:
    return {
        "role": report.role,
        "metric": report.base.metric,
        "rows": report.base.rows,
        "base": report.base.value,
        "base_standard_error": round(report.base.standard_error, 4),
        "adapted": report.adapted.value,
        "adapted_standard_error": round(report.adapted.standard_error, 4),
        "improved": report.improved,
    }


def summary(reports: Sequence[TaskReport]) -> dict[str, Any]:
    """Means by role and metric, and how many tasks improved by more than two standard errors."""
    result: dict[str, Any] = {"improved_tasks": sum(r.improved for r in reports)}
    for key in sorted({(r.role, r.base.metric) for r in reports}):
        members = [r for r in reports if (r.role, r.base.metric) == key]
        result[f"{key[0]} {key[1]}"] = {
            "tasks": len(members),
            "base": round(sum(r.base.value for r in members) / len(members), 4),
            "adapted": round(sum(r.adapted.value for r in members) / len(members), 4),
        }
    return result


def table(reports: Sequence[TaskReport]) -> str:
    """A Markdown table, one row a task, in percent."""
    lines = [
        "| task | role | metric | rows | base | adapted | gain |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for r in reports:
        lines.append(
            f"| {r.task} | {r.role} | {r.base.metric.replace('_', ' ')} | {r.base.rows} "
            f"| {_percent(r.base)} | {_percent(r.adapted)} "
            f"| {100 * r.gain:+.1f}{'' if r.improved else ' (within two standard errors)'} |"
        )
    return "\n".join(lines)


def _percent(score: Score) -> str:
    return f"{100 * score.value:.1f} ± {100 * score.standard_error:.1f}"
