"""Builds the engine that a server is told to run; it is called in the engine's process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from polyrex.adapters.files.inventory import Inventory, load_experts, read_inventory
from polyrex.adapters.model.base_model import load_base, torch_dtype
from polyrex.adapters.model.devices import pick_device
from polyrex.server.config import Device, Dtype, EmbeddedConfig, EngineName, VllmEngineConfig
from polyrex.server.errors import StartError

from .base import Engine
from .vllm.version import check_build

BUILDERS = {
    EngineName.embedded: f"{__name__}:build_embedded",
    EngineName.vllm: f"{__name__}:build_vllm",
}
"""The functions of this file, as EngineClient is given them."""

_DEVELOPERS_ONLY = ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is built from."""

    base: str  # a folder, or for vLLM also a name on the hub
    inventory: str  # a path
    inventory_sha256: str
    dtype: Dtype
    device: Device
    embedded: EmbeddedConfig
    vllm: VllmEngineConfig

    def packed(self) -> dict[str, Any]:
        """The settings as the functions below take them."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found

    def read_inventory(self) -> Inventory:
        """The inventory; raises StartError where its file is not the one that the server read."""
        inventory = read_inventory(Path(self.inventory))
        if inventory.sha256 != self.inventory_sha256:
            raise StartError(f"{self.inventory}: has changed since the server started")
        return inventory


def build_embedded(settings: Mapping[str, Any]) -> Engine:
    """The embedded engine; raises PolyrexError where model, inventory and sizes do not fit."""
    from transformers.utils.logging import disable_progress_bar

    from .embedded.engine import EmbeddedEngine

    told = msgspec.convert(settings, EngineSettings)
    disable_progress_bar()  # type: ignore[no-untyped-call]  # the server's own progress says as much
    inventory = told.read_inventory()
    model = load_base(told.base, torch_dtype(told.dtype), pick_device(told.device))
    return EmbeddedEngine(load_experts(inventory, model), inventory, told.embedded)


def build_vllm(settings: Mapping[str, Any]) -> Engine:
    """The vLLM engine; raises PolyrexError where it cannot run here, or the parts do not fit."""
    told = msgspec.convert(settings, EngineSettings)
    check_build(told.device)
    for name in _DEVELOPERS_ONLY:
        if os.environ.get(name, "0").lower() not in ("", "0", "false"):
            raise StartError(f"{name} is set: it opens vLLM to whoever can reach it")
    try:
        # imported here because vLLM is optional
        from .vllm.engine import VllmEngine
    except ImportError as error:
        raise StartError(
            f"the vllm engine needs vLLM, which cannot be imported: {error}"
        ) from error
    return VllmEngine(told.base, told.read_inventory(), told.vllm, told.dtype)
