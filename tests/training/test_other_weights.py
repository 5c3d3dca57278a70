"""Training, scores and exports refuse an inventory that was made for other weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polyrex.adapters.errors import BaseModelMismatch
from polyrex.adapters.files.bundle import Bundle
from polyrex.adapters.files.inventory import load_experts, read_inventory, write_inventory
from polyrex.adapters.files.router import RouterMetadata, write_router
from polyrex.adapters.model.base_model import load_base
from polyrex.training.adapt import AdaptConfig, adapt
from polyrex.training.cli.exchange import export
from polyrex.training.evaluation.report import evaluate_tasks
from polyrex.training.exchange.fingerprint import note_weights
from polyrex.training.fit_worker import FitJob, run_job
from support.weights.fine_tuned import fine_tune

TASK = "colour"


@pytest.fixture
def inventory(tiny_inventory: Path) -> Path:
    """The tiny inventory, with a router for one task beside it."""
    read = read_inventory(tiny_inventory)
    path = Bundle(read).router_path(TASK)
    path.parent.mkdir()
    metadata = RouterMetadata(read.sha256, TASK)
    write_router(path, torch.zeros(read.routing_shape), read.spec, metadata)
    return tiny_inventory


def adapting(inventory: Path, base: str, rows: Path, out: Path) -> None:
    config = AdaptConfig(rows, TASK, inventory, out, base=base, device="cpu")
    adapt(replace(config, loop=replace(config.loop, steps=1)))


def scoring(inventory: Path, base: str, rows: Path, out: Path) -> None:
    evaluate_tasks(rows, inventory, out / "scores.json", base=base, device="cpu")


def fitting(inventory: Path, base: str, rows: Path, out: Path) -> None:
    thing = {"input": "brick", "answer": "red"}
    job = FitJob(base, str(inventory), "t", "", [thing] * 12, str(out / "router"), device="cpu")
    run_job(job, lambda *_, **__: None)


def exporting(inventory: Path, base: str, rows: Path, out: Path) -> None:
    export(
        inventory=inventory,
        router=Bundle.read(inventory).router_path(TASK),
        out=out / "lora",
        base=base,
    )


@pytest.mark.parametrize("use", [adapting, scoring, fitting, exporting])
def test_other_weights_of_the_same_shape_are_refused(
    use: Callable[[Path, str, Path, Path], None],
    inventory: Path,
    tiny_base: Path,
    rows_folder: Path,
    tmp_path: Path,
) -> None:
    other = fine_tune(str(tiny_base), tmp_path / "other")
    (tmp_path / "out").mkdir()
    with pytest.raises(BaseModelMismatch, match="another fine-tune or revision"):
        use(inventory, other, rows_folder, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def test_an_adapted_inventory_names_the_weights_of_its_own(
    inventory: Path, tiny_base: Path, tmp_path: Path
) -> None:
    read = read_inventory(inventory)
    adapted = load_experts(read, load_base(str(tiny_base), torch.float32))
    write_inventory(tmp_path / "adapted.safetensors", adapted)
    assert read_inventory(tmp_path / "adapted.safetensors").base == read.base


def test_weights_are_noted_unless_the_inventory_names_others(
    inventory: Path, tiny_base: Path, tmp_path: Path
) -> None:
    assert note_weights(inventory, str(tiny_base)) == read_inventory(inventory).base.weights
    other = fine_tune(str(tiny_base), tmp_path / "other")
    with pytest.raises(BaseModelMismatch, match="another fine-tune or revision"):
        note_weights(inventory, other)
    with pytest.raises(BaseModelMismatch, match="nowhere: no safetensors files"):
        note_weights(inventory, "nowhere")
