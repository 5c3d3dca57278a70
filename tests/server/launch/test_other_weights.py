"""A server refuses an inventory that was made for other weights, or that has changed meanwhile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polyrex.adapters.errors import BaseModelMismatch
from polyrex.adapters.files.inventory import load_experts, read_inventory, write_inventory
from polyrex.adapters.model.attach import attach, find_targets
from polyrex.adapters.model.base_model import load_base
from polyrex.adapters.spec import AdapterSpec
from polyrex.server.config import Device, Dtype, EmbeddedConfig, VllmEngineConfig
from polyrex.server.engines.building import EngineSettings, build_embedded
from polyrex.server.errors import StartError
from support.weights.fine_tuned import fine_tune

BASE = str(Path(__file__).parents[2] / "fixtures" / "old_files" / "base")


@pytest.fixture
def settings(tmp_path: Path) -> EngineSettings:
    """An engine of the base model and an inventory that was made for it."""
    model = load_base(BASE, torch.float32)
    path = tmp_path / "inventory.safetensors"
    write_inventory(path, attach(model, AdapterSpec("lora", rank=2), find_targets(model)))
    return EngineSettings(
        base=BASE,
        inventory=str(path),
        inventory_sha256=read_inventory(path).sha256,
        dtype=Dtype.float32,
        device=Device.cpu,
        embedded=EmbeddedConfig(),
        vllm=VllmEngineConfig(),
    )


def test_the_embedded_engine_refuses_other_weights(
    settings: EngineSettings, tmp_path: Path
) -> None:
    other = fine_tune(BASE, tmp_path / "other")
    with pytest.raises(BaseModelMismatch, match="another fine-tune or revision"):
        build_embedded(replace(settings, base=other).packed())
    inventory = read_inventory(Path(settings.inventory))
    assert load_experts(inventory, load_base(BASE, torch.float32)).targets == inventory.targets


def test_an_inventory_that_has_changed_since_the_start_is_refused(settings: EngineSettings) -> None:
    with pytest.raises(StartError, match="has changed since the server started"):
        build_embedded(replace(settings, inventory_sha256="0" * 64).packed())
