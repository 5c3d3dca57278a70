"""The inventory that comes with polyrex, and its tasks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.files.bundle import Bundle
from polyrex.adapters.files.inventory import Inventory, load_experts, read_inventory
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.adapters.model.base_model import DEFAULT_BASE, load_base
from polyrex.training.data.tasks import load_tasks
from polyrex.training.evaluation.evaluate import evaluate

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "adapters" / "shipped" / DEFAULT_BASE
ROWS = ROOT / "training" / "rows"


@pytest.fixture(scope="module")
def inventory() -> Inventory:
    return read_inventory(SHIPPED / "inventory.safetensors")


@pytest.fixture(scope="module")
def scores() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((SHIPPED / "scores.json").read_text())
    return found


@pytest.fixture(scope="module")
def adapted(inventory: Inventory, base_path: str) -> AdaptedModel:
    found = load_experts(inventory, load_base(base_path, torch.float32))
    found.prepare(torch.float32)
    return found


def test_it_is_at_most_8_megabytes() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*")) <= 8e6


def test_it_is_tensorpoly_1_on_every_projection(inventory: Inventory) -> None:
    spec = inventory.spec
    assert (spec.method, spec.rank, spec.experts, spec.order) == ("tensorpoly-1", 16, 8, 2)
    assert len(inventory.targets) == 7 * inventory.base.layers


def test_it_brings_tasks_adapted_from_32_rows(inventory: Inventory) -> None:
    bundle = Bundle(inventory)
    tasks = [bundle.task(name).info for name in bundle.tasks]
    assert len(tasks) >= 16
    few_shot = [t for t in tasks if t.provenance["trained"] == "adapted (routing)"]
    assert len(few_shot) >= 3
    assert all(task.provenance["rows"] == 32 for task in few_shot)
    assert all(str(task.provenance["example_prompt"]).endswith("Answer:") for task in tasks)


def test_its_scores_are_its_own(inventory: Inventory, scores: dict[str, Any]) -> None:
    assert scores["inventory_sha256"] == inventory.sha256
    assert set(scores["tasks"]) == set(Bundle(inventory).logits())
    assert scores["split"] == "test"


def test_its_scores_reach_the_goals(scores: dict[str, Any]) -> None:
    summary = scores["summary"]
    held_in = summary["held_in rank_classification_accuracy"]
    assert held_in["adapted"] - held_in["base"] >= 0.30
    assert summary["improved_tasks"] >= 12


def test_its_card_shows_every_score(scores: dict[str, Any]) -> None:
    card = (SHIPPED / "README.md").read_text()
    for name, score in scores["tasks"].items():
        (row,) = [line for line in card.splitlines() if line.startswith(f"| {name} |")]
        assert f"| {score['rows']} | {100 * score['base']:.1f} ± " in row
        assert f"| {100 * score['adapted']:.1f} ± " in row


@pytest.mark.parametrize("name", ["intent_snips", "past_tense", "plural"])
def test_its_tasks_beat_the_base_model(
    name: str, inventory: Inventory, adapted: AdaptedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    (task,) = load_tasks(ROWS, (name,))
    task = replace(task, rows={**task.rows, "test": task.rows["test"][:40]})
    logits = Bundle(inventory).logits()[name]
    after = evaluate(adapted, tokenizer, task, logits).value
    before = evaluate(adapted, tokenizer, task, None).value
    assert after - before >= 0.2
