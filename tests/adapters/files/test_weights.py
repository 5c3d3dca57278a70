"""An inventory is attached to the weights that it was made for, and says so of old files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from polyrex.adapters.errors import BaseModelMismatch, MalformedFile
from polyrex.adapters.files.inventory import (
    Inventory,
    load_experts,
    read_inventory,
    write_fingerprint,
    write_inventory,
)
from polyrex.adapters.files.tensor_file import serialise
from polyrex.adapters.model.attach import attach, find_targets
from polyrex.adapters.model.base_model import DEFAULT_BASE, load_base
from polyrex.adapters.model.fingerprint import fingerprint
from polyrex.adapters.spec import AdapterSpec
from support.small_model import random_llama
from support.weights.fine_tuned import fine_tune

SHIPPED = Path(__file__).parents[3] / "adapters" / "shipped" / DEFAULT_BASE
NOTES = "fingerprint.json"


@pytest.fixture
def base(tmp_path: Path) -> str:
    model: Any = random_llama()
    model.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def inventory(base: str, tmp_path: Path) -> Inventory:
    """An inventory made for the base model."""
    model = load_base(base, torch.float32)
    adapted = attach(model, AdapterSpec("poly", rank=2, experts=3), find_targets(model))
    (tmp_path / "mine").mkdir()
    write_inventory(tmp_path / "mine" / "inventory.safetensors", adapted)
    return read_inventory(tmp_path / "mine" / "inventory.safetensors")


@pytest.fixture
def old(inventory: Inventory) -> Inventory:
    """The same, as it was written before there were fingerprints."""
    with safe_open(inventory.path, "pt") as file:
        metadata = file.metadata()
    del metadata["weights"]
    inventory.path.write_bytes(serialise(load_file(inventory.path), metadata))
    return read_inventory(inventory.path)


def modules(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules()]


def test_an_inventory_names_the_weights_that_it_was_made_for(
    inventory: Inventory, base: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert inventory.base.weights == fingerprint(base)
    load_experts(inventory, load_base(base, torch.bfloat16))
    assert not caplog.records


def test_other_weights_of_the_same_shape_are_refused_untouched(
    inventory: Inventory, base: str, tmp_path: Path
) -> None:
    other = fine_tune(base, tmp_path / "other")
    model = load_base(other, torch.float32)
    before = modules(model)
    with pytest.raises(BaseModelMismatch) as refused:
        load_experts(inventory, model)
    message = str(refused.value)
    assert message.startswith(f"{inventory.path}: made for a base model with weights float-1:")
    assert str(inventory.base.weights) in message
    assert str(fingerprint(other)) in message
    assert "Load the model that the inventory was made for, or train" in message
    assert "\n" not in message
    assert modules(model) == before


def test_resharded_copy_in_another_dtype_is_taken(
    inventory: Inventory, base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = load_base(base, torch.bfloat16)
    model.save_pretrained(tmp_path / "copy", max_shard_size="4KB")
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 1
    adapted = load_experts(inventory, load_base(str(tmp_path / "copy"), torch.float32))
    assert adapted.targets == inventory.targets
    assert not caplog.records


def test_old_inventory_is_taken_with_one_warning(
    old: Inventory, base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapted = load_experts(old, load_base(fine_tune(base, tmp_path / "other"), torch.float32))
    assert adapted.targets == old.targets
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "inventory.safetensors: does not say for which weights" in record.getMessage()


def test_old_inventory_is_written_again_without_a_claim(
    old: Inventory, base: str, tmp_path: Path
) -> None:
    """Nobody knows that its experts were made for the weights that they are on now."""
    adapted = load_experts(old, load_base(base, torch.float32))
    write_inventory(tmp_path / "again", adapted)
    assert (tmp_path / "again").read_bytes() == old.path.read_bytes()


def test_model_whose_files_are_not_there_is_taken_with_a_warning(
    inventory: Inventory, caplog: pytest.LogCaptureFixture
) -> None:
    load_experts(inventory, random_llama())
    (record,) = caplog.records
    assert "were not checked" in record.getMessage()


def test_files_quantised_by_a_library_are_taken_with_a_warning(
    inventory: Inventory, caplog: pytest.LogCaptureFixture
) -> None:
    inventory.base.check_weights("awq-1:" + "0" * 32, "inventory")
    (record,) = caplog.records
    assert "cannot be compared" in record.getMessage()


def test_notes_beside_an_old_inventory_say_for_which_weights_it_was_made(
    old: Inventory, base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = old.path.read_bytes()
    write_fingerprint(old, str(fingerprint(base)))
    assert old.path.read_bytes() == before
    noted = read_inventory(old.path)
    assert (noted.sha256, noted.base.weights) == (old.sha256, fingerprint(base))
    load_experts(noted, load_base(base, torch.float32))
    assert not caplog.records
    with pytest.raises(BaseModelMismatch, match="made for a base model with weights"):
        load_experts(noted, load_base(fine_tune(base, tmp_path / "other"), torch.float32))


def test_notes_of_another_inventory_say_nothing(old: Inventory, base: str) -> None:
    old.path.with_name(NOTES).write_text(json.dumps({"0" * 64: fingerprint(base)}))
    assert read_inventory(old.path).base.weights is None


@pytest.mark.parametrize("text", ["{", "[]", '{"SHA": 1}', '{"SHA": "float-1:abc"}'])
def test_notes_that_cannot_be_read_are_refused(text: str, old: Inventory) -> None:
    old.path.with_name(NOTES).write_text(text.replace("SHA", old.sha256))
    with pytest.raises(MalformedFile, match="fingerprint"):
        read_inventory(old.path)


def test_shipped_inventory_was_made_for_the_default_base_model(base_path: str) -> None:
    inventory = read_inventory(SHIPPED / "inventory.safetensors")
    assert inventory.base.weights == fingerprint(base_path)
