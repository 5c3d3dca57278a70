"""Part 5: the study's methods trained on the real small model at full depth, with several seeds.

Adapters are on every projection, where the committed study has those of the last ten layers; steps,
rows and learning rates are the study's. A run that is cut short goes on in the next one, from its
last checkpoint in `--work`. The base model comes from the pieces of a bundle, from its package, or
from polyrex's cache.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.gpu.base_pieces import join_pieces
from bench.gpu.part import Part, run_as_part
from bench.gpu.workspace import ROOT
from polyrex.adapters.errors import FileError
from polyrex.adapters.files.bundle import INVENTORY
from polyrex.adapters.model.base_model import DEFAULT_BASE, resolve_base
from polyrex.training.evaluation.report import evaluate_tasks
from polyrex.training.study.search import best_rates
from polyrex.training.study.variants import TRAIN, VARIANTS, StudyConfig, Variant
from polyrex.training.train import TrainConfig, train

NAMES = ("tensorpoly-1-e8-n2", "tensorpoly-2", "poly", "lora")
SEEDS = (0, 1, 2)
ROWS = ROOT / "training" / "rows"
STUDY = ROOT / "tests" / "results" / "study"
TINY_BASE = ROOT / "tests" / "fixtures" / "old_files" / "base"
TINY_ROWS = 4
LEAST_SECONDS = 20.0


def train_and_score(part: Part, base: str, data: Path, variant: Variant, seed: int) -> Any:
    """One variant with one seed: its curve's ends, and the scores of its tasks."""
    folder = part.work / "study" / f"{variant.name}-{seed}"
    rates = best_rates(StudyConfig(data, STUDY, part.work), variant)
    loop = replace(TRAIN, rates=rates, seed=seed)
    if part.dry:
        loop = replace(loop, steps=2, warmup=1)
    config = TrainConfig(data, folder, variant.spec, base, loop=loop, device=part.device.type)
    train(config)
    evaluate_tasks(
        data, folder / INVENTORY, folder / "scores.json", base=base, device=part.device.type
    )
    scores = json.loads((folder / "scores.json").read_text())["summary"]
    record = json.loads((folder / "record.json").read_text())
    curve = record["curve"]
    return {
        "steps": len(curve),
        "first_loss": curve[0][1],
        "last_loss": curve[-1][1],
        "tokens_per_second": sorted(speed for *_, speed in curve)[len(curve) // 2],
        "scores": scores,
    }


def few_rows(folder: Path) -> Path:
    """A data folder for dry runs: a few rows of two tasks."""
    manifest = json.loads((ROWS / "manifest.json").read_text())
    entries = [entry for entry in manifest["tasks"] if entry["role"] == "held_in"][:2]
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"tasks": entries}))
    for entry in entries:
        file = Path("tasks") / f"{entry['task']}.jsonl"
        lines = (ROWS / file).read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        kept = [
            line
            for split in ("train", "valid", "test")
            for line in [json.dumps(row) for row in rows if row["split"] == split][:TINY_ROWS]
        ]
        (folder / file).write_text("\n".join(kept) + "\n")
    return folder


def measure(part: Part) -> None:
    """The part."""
    logging.basicConfig(level=logging.WARNING)
    base, data = DEFAULT_BASE, ROWS
    if part.dry:
        base, data = str(TINY_BASE), few_rows(part.work / "rows")
    else:
        os.environ.setdefault("POLYREX_CACHE", str(part.work / "cache"))
        try:
            join_pieces(part.bundle, part.work)
            resolve_base(base)
        except (FileError, ImportError, ValueError) as error:
            part.leave_out("study", error)
            return
    variants = {variant.name: variant for variant in VARIANTS}
    for seed in SEEDS[:1] if part.dry else SEEDS:
        for name in NAMES[:1] if part.dry else NAMES:
            run = partial(train_and_score, part, base, data, variants[name], seed)
            part.try_to(f"{name}, seed {seed}", run, LEAST_SECONDS if not part.dry else 0)


if __name__ == "__main__":
    run_as_part("study", __doc__, measure)
