"""The vLLM engine refuses a model whose weights are not those that the inventory was made for."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from polyrex.adapters.errors import BaseModelMismatch
from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.spec import AdapterSpec
from polyrex.server.config import VllmEngineConfig
from polyrex.server.engines.vllm import engine as vllm_engine
from polyrex.server.engines.vllm.engine import VllmEngine
from polyrex.server.errors import EngineStopped
from support.random_inventory import make_inventory
from support.running_vllm import SMALL
from support.weights.fine_tuned import fine_tune


@pytest.fixture
def inventory(small_base: str, tmp_path: Path) -> Inventory:
    spec = AdapterSpec("poly", rank=2, experts=3)
    return make_inventory(tmp_path / "inventory.safetensors", small_base, spec)


def test_other_weights_are_refused_before_vllm_starts(
    inventory: Inventory, small_base: str, tmp_path: Path
) -> None:
    other = fine_tune(small_base, tmp_path / "other")
    with pytest.raises(BaseModelMismatch, match="another fine-tune or revision"):
        VllmEngine(other, inventory, VllmEngineConfig(), "float32")
    assert VllmEngine(small_base, inventory, VllmEngineConfig(), "float32").stats().running == 0


def test_weights_that_vllm_downloads_are_checked_before_they_serve(
    inventory: Inventory, small_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = fine_tune(small_base, tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr(vllm_engine, "fingerprint", lambda _: None)  # they are not there yet
        engine = VllmEngine(other, inventory, SMALL, "float32")
    with asyncio.Runner() as runner:
        try:
            with pytest.raises(BaseModelMismatch, match="another fine-tune or revision"):
                runner.run(engine.start())
            with pytest.raises(EngineStopped):
                engine.check()
        finally:
            runner.run(engine.stop())
