"""From names on the command line to an application: model, inventory, tasks, engine."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from transformers.utils.logging import disable_progress_bar

from polyrex.adapters.files.inventory import Inventory, load_experts, read_inventory
from polyrex.adapters.files.registry import TaskRegistry
from polyrex.adapters.model.base_model import load_base, load_tokenizer, resolve_base
from polyrex.server.config import Device, Dtype, EngineName, Launch, ServerConfig
from polyrex.server.engines.base import Engine
from polyrex.server.engines.threads import in_passing_thread
from polyrex.server.errors import StartError
from polyrex.server.http.app import create_app
from polyrex.server.requests.prompt_routing import prompt_intuition

from .progress import Progress

_DTYPES = {Dtype.bfloat16: torch.bfloat16, Dtype.float32: torch.float32}


@dataclass(frozen=True)
class Loaded:
    """An application whose engine is not started yet, and the tasks that it serves."""

    app: FastAPI
    registry: TaskRegistry


def load(launch: Launch, progress: Progress) -> Loaded:
    """Load everything that serving needs; raises PolyrexError where something does not fit."""
    disable_progress_bar()  # type: ignore[no-untyped-call]  # ours says the same in one line
    name = launch.server.model
    path = launch.inventory or shipped_inventory(name)
    with progress.stage(f"inventory {path}"):
        inventory = read_inventory(path)
    with progress.stage(f"base model {name}"):
        base = resolve_base(name, progress.say)
        tokenizer = load_tokenizer(base)
    with progress.stage(f"the {launch.engine} engine"):
        engine = _ENGINES[launch.engine](launch, base, inventory)
    with progress.stage(f"tasks in {launch.tasks_folder}"):
        shipped = path.parent / "routers"
        registry = TaskRegistry(
            launch.tasks_folder, inventory, shipped if shipped.is_dir() else None
        )
    rejected = len(registry.rejected)
    progress.say(f"{len(registry)} tasks" + (f", {rejected} files rejected" if rejected else ""))
    intuition = prompt_intuition(inventory)
    return Loaded(create_app(launch.server, engine, registry, tokenizer, intuition), registry)


def _embedded(launch: Launch, base: str, inventory: Inventory) -> Engine:
    from polyrex.server.engines.embedded.engine import EmbeddedEngine

    def make() -> Engine:
        model = load_base(base, _DTYPES[launch.dtype], _device(launch.device))
        adapted = load_experts(inventory, model)
        return EmbeddedEngine(adapted, model, inventory, launch.engine_config)

    return in_passing_thread(make)


def _vllm(launch: Launch, base: str, inventory: Inventory) -> Engine:
    try:
        from polyrex.server.engines.vllm.engine import (
            VllmEngine,  # here, as vLLM need not be installed
        )
    except ImportError as error:
        raise StartError(
            f"the vllm engine needs vLLM, which cannot be imported: {error}"
        ) from error
    return VllmEngine(base, inventory, launch.vllm_config, launch.dtype)


_ENGINES = {EngineName.embedded: _embedded, EngineName.vllm: _vllm}


def _device(device: Device) -> str:
    if device is Device.auto:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def shipped_inventory(base: str) -> Path:
    """The inventory that comes with polyrex for a base model; raises StartError without one."""
    # Beside this file once its links are followed: an editable install links the code alone.
    package = Path(__file__).resolve().parents[2]
    path = package / "adapters" / "shipped" / base / "inventory.safetensors"
    if not path.exists():
        raise StartError(f"no inventory comes with polyrex for {base}: give --inventory FILE")
    return path


def example_request(config: ServerConfig, registry: TaskRegistry) -> str:
    """A command line that asks one of the tasks something sensible."""
    body: dict[str, Any] = {"prompt": "The capital of France is"}
    for task in registry.list(limit=100):
        prompt = task.provenance.get("example_prompt")
        if isinstance(prompt, str):
            body = {"task": task.name, "prompt": prompt}
            break
    body |= {"max_tokens": 16, "temperature": 0}
    key = ["-H", "Authorization: Bearer $KEY"] if config.api_key_digests else []
    host = f"[{config.host}]" if ":" in config.host else config.host
    address = f"http://{host}:{config.port}/v1/completions"
    arguments = ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    words = [shlex.quote(word) for word in ("curl", address, *arguments)]
    return " ".join(words + ([key[0], f'"{key[1]}"'] if key else []))
