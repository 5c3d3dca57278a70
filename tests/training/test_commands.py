"""polyrex train, adapt and evaluate, as a user runs them, on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from polyrex.adapters.files.inventory import load_experts, read_inventory
from polyrex.adapters.files.router import read_router
from polyrex.adapters.model.base_model import load_base
from polyrex.adapters.model.sentence_encoder import SentenceEncoder
from polyrex.training.adapt import starts_of
from polyrex.training.data.tasks import load_tasks, prompt_of
from support.command_line import Finished, polyrex


@pytest.fixture(scope="module")
def run_folder(
    tiny_base: Path, rows_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished training run of the two held_in tasks."""
    out: Path = tmp_path_factory.mktemp("run")
    result = polyrex(
        *("train", "--data", rows_folder, "--out", out, "--base", tiny_base),
        *("--rank", 3, "--experts", 4, "--steps", 6, "--batch-rows", 4, "--gate-rate", 0.05),
        *("--device", "cpu"),
    )
    assert result.exit_code == 0, result.output
    return out


def adapt(run_folder: Path, rows: Path, base: Path, out: Path, mode: str) -> Finished:
    return polyrex(
        *("adapt", "--data", rows, "--task", "other_colour", "--out", out, "--base", base),
        *("--inventory", run_folder / "inventory.safetensors", "--mode", mode, "--steps", 3),
    )


def test_train_writes_an_inventory_with_its_routers(run_folder: Path, tiny_base: Path) -> None:
    inventory = read_inventory(run_folder / "inventory.safetensors")
    load_experts(inventory, load_base(str(tiny_base), torch.float32))
    for task in ("colour", "shout"):
        path = run_folder / "routers" / f"{task}.safetensors"
        router = read_router(path.read_bytes(), str(path), inventory)
        assert router.metadata.task == task
        assert router.metadata.provenance["example_prompt"].endswith("Answer:")


def test_train_with_intuition_routes_tasks_by_their_prompts(
    tiny_base: Path, rows_folder: Path, tmp_path: Path
) -> None:
    command = (
        *("train", "--data", rows_folder, "--out", tmp_path, "--base", tiny_base),
        *("--method", "trex", "--rank", 2, "--rank-out", 3, "--intuition", 3),
        *("--steps", 4, "--batch-rows", 4),
    )
    refused = polyrex(*command)
    assert refused.exit_code == 2
    assert "intuition needs granularity=model" in refused.output
    done = polyrex(*command, "--granularity", "model")
    assert done.exit_code == 0, done.output
    inventory = read_inventory(tmp_path / "inventory.safetensors")
    assert inventory.intuition is not None
    assert inventory.intuition.map.shape == (6, 3)  # I * J gates, three centroids
    encoder = SentenceEncoder.of(inventory.intuition.encoder)
    for task in load_tasks(rows_folder, role="held_in"):
        path = tmp_path / "routers" / f"{task.name}.safetensors"
        found = read_router(path.read_bytes(), str(path), inventory).logits
        prompts = [prompt_of(task.instruction, row) for row in task.rows["train"]]
        expected = inventory.intuition.of(encoder.embed(prompts)).mean(0, keepdim=True)
        # Centroids are stored in half precision.
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
        torch.testing.assert_close(starts_of(inventory, prompts)["own"], expected)
    done = adapt(tmp_path, rows_folder, tiny_base, tmp_path / "new", "routing")
    assert done.exit_code == 0, done.output


def test_record_tells_config_curve_and_commit(run_folder: Path) -> None:
    record = json.loads((run_folder / "record.json").read_text())
    assert record["config"]["spec"]["method"] == "tensorpoly-1"
    assert record["config"]["loop"]["seed"] == 0
    assert [step for step, _, _ in record["curve"]] == list(range(6))
    assert record["commit"]


def test_routing_adaptation_leaves_the_inventory(
    run_folder: Path, rows_folder: Path, tiny_base: Path, tmp_path: Path
) -> None:
    before = (run_folder / "inventory.safetensors").read_bytes()
    result = adapt(run_folder, rows_folder, tiny_base, tmp_path, "routing")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "other_colour.json",
        "other_colour.safetensors",
    ]
    path = tmp_path / "other_colour.safetensors"
    inventory = read_inventory(run_folder / "inventory.safetensors")
    router = read_router(path.read_bytes(), str(path), inventory)
    assert router.metadata.inventory_sha256 == inventory.sha256
    assert (run_folder / "inventory.safetensors").read_bytes() == before


@pytest.mark.parametrize("mode", ["modules", "both"])
def test_other_modes_write_an_inventory_of_their_own(
    run_folder: Path, rows_folder: Path, tiny_base: Path, tmp_path: Path, mode: str
) -> None:
    result = adapt(run_folder, rows_folder, tiny_base, tmp_path, mode)
    assert result.exit_code == 0, result.output
    inventory = read_inventory(tmp_path / "inventory.safetensors")
    path = tmp_path / "other_colour.safetensors"
    router = read_router(path.read_bytes(), str(path), inventory)
    assert inventory.sha256 != read_inventory(run_folder / "inventory.safetensors").sha256
    # Fresh logits lie within 1e-3 of 0; modules leaves them there.
    assert (router.logits.abs().max() <= 1e-3) == (mode == "modules")


def test_evaluate_reports_base_and_adapted(
    run_folder: Path, rows_folder: Path, tiny_base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scores.json"
    command = ("evaluate", "--data", rows_folder, "--base", tiny_base, "--out", out)
    inventory = ("--inventory", run_folder / "inventory.safetensors")
    result = polyrex(*command, *inventory)
    assert result.exit_code == 0, result.output
    assert "| colour | held_in | rank classification accuracy | 4 |" in result.output
    scores = json.loads(out.read_text())
    assert set(scores["tasks"]) == {"colour", "shout"}
    assert scores["summary"]["held_in exact_match"]["tasks"] == 1
    record = json.loads((run_folder / "record.json").read_text())
    assert record["scores"]["test"] == scores["summary"]
    # A second run keeps the base model's scores and says the same.
    assert polyrex(*command, *inventory).exit_code == 0
    assert json.loads(out.read_text())["tasks"] == scores["tasks"]


def test_bad_input_is_a_message_and_exit_code_2(rows_folder: Path, tmp_path: Path) -> None:
    result = polyrex("train", "--data", rows_folder, "--out", tmp_path, "--method", "tensor-poly-1")
    assert result.exit_code == 2
    assert "did you mean tensorpoly-1" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a card")
@pytest.mark.parametrize("command", ["train", "adapt", "evaluate", "compress"])
def test_card_that_is_not_there_is_one_line(
    run_folder: Path, rows_folder: Path, tmp_path: Path, command: str
) -> None:
    data, inventory = ("--data", rows_folder), run_folder / "inventory.safetensors"
    arguments: dict[str, tuple[object, ...]] = {
        "train": data,
        "adapt": (*data, "--task", "other_colour", "--inventory", inventory),
        "evaluate": (*data, "--inventory", inventory),
        "compress": (tmp_path, "--rank", 2),
    }
    out = tmp_path / "out"
    done = polyrex(command, *arguments[command], "--out", out, "--device", "cuda")
    assert done.exit_code == 2
    assert done.output.startswith(f"polyrex {command}: device cuda: expected CUDA device 0, but ")
    assert done.output.count("\n") == 1
    assert not out.exists()


def test_card_that_is_full_is_one_line(
    rows_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> Path:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")

    monkeypatch.setattr("polyrex.training.cli.train.run_training", full)
    done = polyrex("train", "--data", rows_folder, "--out", tmp_path)
    assert done.exit_code == 2
    assert done.output.startswith("polyrex train: the card has too little memory; --gradient-")
    assert done.output.count("\n") == 1


def test_gradient_checkpointing_trains_the_same(
    run_folder: Path, tiny_base: Path, rows_folder: Path, tmp_path: Path
) -> None:
    done = polyrex(
        *("train", "--data", rows_folder, "--out", tmp_path, "--base", tiny_base),
        *("--rank", 3, "--experts", 4, "--steps", 6, "--batch-rows", 4, "--gate-rate", 0.05),
        *("--gradient-checkpointing", "--device", "cpu"),
    )
    assert done.exit_code == 0, done.output
    found, expected = (
        json.loads((folder / "record.json").read_text()) for folder in (tmp_path, run_folder)
    )
    assert found["config"]["gradient_checkpointing"]
    losses = [[loss for _, loss, _ in record["curve"]] for record in (found, expected)]
    assert losses[0] == losses[1]
