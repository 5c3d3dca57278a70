"""Scores of many tasks, by the base model and adapted, as JSON and as a Markdown table."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.progress import Progress

from polyrex.adapters.errors import DataError
from polyrex.adapters.files.bundle import Bundle
from polyrex.adapters.files.inventory import load_experts, read_inventory
from polyrex.adapters.model.base_model import (
    Quantisation,
    load_base,
    load_tokenizer,
    resolve_base,
    torch_dtype,
)
from polyrex.adapters.model.devices import pick_device
from polyrex.training.data.tasks import Split, load_tasks
from polyrex.training.records import current_commit, write_record

from .evaluate import Score, evaluate

logger = logging.getLogger(__name__)

Verdict = Literal["better", "worse", "within two standard errors"]


@dataclass(frozen=True)
class TaskReport:
    """One task's scores, by the base model alone and under the task's router."""

    task: str
    role: str
    base: Score
    adapted: Score

    @property
    def gain(self) -> float:
        """The adapted score minus that of the base model, as a share."""
        return self.adapted.value - self.base.value

    @property
    def verdict(self) -> Verdict:
        """Whether the task gains or loses more than two standard errors of the difference, for
        which the two scores are taken as independent."""
        error = math.hypot(self.base.standard_error, self.adapted.standard_error)
        if abs(self.gain) <= 2 * error:
            return "within two standard errors"
        return "better" if self.gain > 0 else "worse"


def evaluate_tasks(
    data: Path,
    inventory: Path,
    out: Path,
    *,
    base: str,
    tasks: Sequence[str] | None = None,
    split: Split = "test",
    dtype: str = "bfloat16",
    device: str = "auto",
    quantize: Quantisation | None = None,
) -> list[TaskReport]:
    """Score all tasks that have a router beside the inventory, or those named; write `out` (JSON).

    Routers without rows in the data folder are left out with a warning, and listed in `out`. Scores
    of the base model do not depend on the inventory: those already in `out`, for the same split,
    numbers and number of rows, are kept. Raises DataError for a task without a router, DeviceError
    for a device that is not there.
    """
    place = pick_device(device)
    read = read_inventory(inventory)
    routers = Bundle(read).logits()
    missing = sorted(set(tasks or ()) - set(routers))
    if missing:
        raise DataError(f"{inventory.parent}/routers: no router for {', '.join(missing)}")
    known_tasks = {task.name for task in load_tasks(data)}
    without_rows = sorted(set(routers) - known_tasks) if tasks is None else []
    if without_rows:
        logger.warning("%s has no rows for %s: not scored", data, ", ".join(without_rows))
    chosen = load_tasks(data, tasks or sorted(known_tasks & set(routers)))
    path = resolve_base(base)
    tokenizer = load_tokenizer(path)
    model = load_base(path, torch_dtype(dtype), place, quantize)
    adapted = load_experts(read, model)
    adapted.prepare(torch_dtype(dtype))
    same = {"split": split, "dtype": dtype, "quantize": quantize}
    known = _known_base_scores(out, same)
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
                **same,
                "without_rows": without_rows,
                "commit": current_commit(),
                "summary": summary(reports),
                "tasks": {r.task: _entry(r) for r in reports},
            }
            write_record(out, record)
    _add_to_run(inventory.with_name("record.json"), split, summary(reports))
    return reports


def _add_to_run(path: Path, split: Split, scores: dict[str, Any]) -> None:
    """Add the scores to the record of the run that made the inventory, if that is beside it."""
    if path.exists():
        record = json.loads(path.read_text())
        write_record(path, record | {"scores": record.get("scores", {}) | {split: scores}})


def _known_base_scores(out: Path, same: dict[str, str | None]) -> dict[str, Score]:
    """The base model's scores in `out`, if that is of the same split and numbers."""
    if not out.exists():
        return {}
    found = json.loads(out.read_text())
    if any(found.get(key) != value for key, value in same.items()):
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
        "improved": report.verdict == "better",
        "verdict": report.verdict,
    }


def summary(reports: Sequence[TaskReport]) -> dict[str, Any]:
    """Means by role and metric, and the numbers of tasks that got better and worse."""
    verdicts = [report.verdict for report in reports]
    result: dict[str, Any] = {
        "improved_tasks": verdicts.count("better"),
        "worse_tasks": verdicts.count("worse"),
    }
    for key in sorted({(r.role, r.base.metric) for r in reports}):
        members = [r for r in reports if (r.role, r.base.metric) == key]
        result[f"{key[0]} {key[1]}"] = {
            "tasks": len(members),
            "base": round(sum(r.base.value for r in members) / len(members), 4),
            "adapted": round(sum(r.adapted.value for r in members) / len(members), 4),
        }
    return result


def table(reports: Sequence[TaskReport]) -> str:
    """A Markdown table in percent, with a row for each task; gains that are not better say so."""
    lines = [
        "| task | role | metric | rows | base | adapted | gain |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for r in reports:
        note = "" if r.verdict == "better" else f" ({r.verdict})"
        lines.append(
            f"| {r.task} | {r.role} | {r.base.metric.replace('_', ' ')} | {r.base.rows} "
            f"| {_percent(r.base)} | {_percent(r.adapted)} "
            f"| {100 * r.gain:+.1f}{note} |"
        )
    return "\n".join(lines)


def _percent(score: Score) -> str:
    return f"{100 * score.value:.1f} ± {100 * score.standard_error:.1f}"
