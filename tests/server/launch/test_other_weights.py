"""A server refuses an inventory that was made for other weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polyrex.adapters.errors import BaseModelMismatch
from polyrex.adapters.files.inventory import load_experts, read_inventory, write_inventory
from polyrex.adapters.model.attach import attach, find_targets
from polyrex.adapters.model.base_model import load_base
from polyrex.adapters.spec import AdapterSpec
from polyrex.server.config import Launch
from polyrex.server.launch import loading
from support.weights.fine_tuned import fine_tune

BASE = str(Path(__file__).parents[2] / "fixtures" / "old_files" / "base")


def test_the_embedded_engine_refuses_other_weights(tmp_path: Path) -> None:
    model = load_base(BASE, torch.float32)
    path = tmp_path / "inventory.safetensors"
    write_inventory(path, attach(model, AdapterSpec("lora", rank=2), find_targets(model)))
    inventory = read_inventory(path)
    other = fine_tune(BASE, tmp_path / "other")
    with pytest.raises(BaseModelMismatch, match="another fine-tune or revision"):
        loading._embedded(Launch(), other, inventory)
    assert load_experts(inventory, load_base(BASE, torch.float32)).targets == inventory.targets
