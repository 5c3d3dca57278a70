"""Compares compressed LoRAs with the originals, on the test rows of their tasks."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from bench.harness import report, without
from polyrex.adapters.files.bundle import Bundle
from polyrex.adapters.peft.lora_checkpoint import PeftLora
from polyrex.training.data.tasks import load_tasks
from polyrex.training.exchange.drift import uncompressed
from polyrex.training.exchange.lora_folder import read_loras
from polyrex.training.study.setup import Bench
from polyrex.training.study.variants import StudyConfig

logger = logging.getLogger(__name__)


def task_of(lora: PeftLora) -> str:
    """The task that a LoRA `TASK-SEED` was trained on."""
    return lora.name.rpartition("-")[0]


def compare(
    data: Path, loras: Sequence[PeftLora], compressed: Path, work: Path, rows: int
) -> dict[str, Any]:
    """Score each LoRA, its compressed form and the base model on the first test rows of its task.

    `same` is the share of rows that the LoRA and its compressed form answer alike.
    """
    names = tuple(task.name for task in load_tasks(data) if task.name in set(map(task_of, loras)))
    bench = Bench.open(StudyConfig(data, work, work, held_out=names, test_rows=rows))
    tasks = {task.name: task for task in bench.held_out}
    questions = {name: bench.questions(task) for name, task in tasks.items()}
    bundle = Bundle.read(compressed)
    adapted = bench.load(bundle.inventory)

    def answers(name: str) -> list[tuple[int, bool]]:
        return bench.answers(adapted, tasks[name], questions[name])

    with adapted.routed(None):
        base = {name: mean(right for _, right in answers(name)) for name in tasks}
    by_lora = {}
    for lora in loras:
        name = task_of(lora)
        with adapted.routed(bundle.router(lora.name).logits):
            ours = answers(name)
        with uncompressed(adapted, lora):
            theirs = answers(name)
        by_lora[lora.name] = {
            "base": base[name],
            "original": mean(right for _, right in theirs),
            "compressed": mean(right for _, right in ours),
            "same": mean(a == b for (a, _), (b, _) in zip(ours, theirs, strict=True)),
        }
        logger.info("%s: %s", lora.name, by_lora[lora.name])
    sums = {
        key: round(mean(each[key] for each in by_lora.values()), 4)
        for key in ("base", "original", "compressed", "same")
    }
    return {**sums, "rows_a_task": rows, "by_lora": by_lora}


def main() -> None:
    """The third step of `make bench-compress`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with manifest.json")
    parser.add_argument("--loras", type=Path, required=True, help="the originals")
    parser.add_argument("--compressed", type=Path, required=True, help="the compressed ones")
    parser.add_argument("--work", type=Path, required=True, help="folder for caches")
    parser.add_argument("--rows", type=int, default=20, help="test rows of each task, at most")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    loras = read_loras(options.loras)
    found = compare(options.data, loras, options.compressed, options.work, options.rows)
    report(found, options.compressed / "scores.json", without(found, "by_lora"))


if __name__ == "__main__":
    main()
