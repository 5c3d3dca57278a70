"""The process behind ForkServer: reads one order a line, and forks a server for each.

It must have one thread when it forks, and no database: every server opens its own.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import torch
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.files.inventory import Inventory, load_experts, read_inventory
from polyrex.adapters.model.base_model import load_base, load_tokenizer
from polyrex.server.config import (
    Device,
    Dtype,
    EmbeddedConfig,
    EngineName,
    RegistryConfig,
    ServerConfig,
    VllmEngineConfig,
)
from polyrex.server.engines.base import Engine
from polyrex.server.engines.building import BUILDERS, EngineSettings
from polyrex.server.engines.embedded.engine import EmbeddedEngine
from polyrex.server.engines.process.client import EngineClient, Supervision
from polyrex.server.http.app import create_app
from polyrex.server.launch.process import bind, run
from polyrex.server.registry.database import Database
from polyrex.server.registry.registry import TaskRegistry

from .engines import EchoEngine
from .planted import plant_in_app, plant_in_engine, plant_in_registry
from .stress.planted import plant_in_stressed_app, plant_in_stressed_engine
from .stress.probe import install_probe
from .stress.stub_engine import STUB, StubSettings

MODEL = "small"
"""The name of the base model in requests."""

SUPERVISION = Supervision(stall_seconds=2.0, healthy_seconds=0.0)
"""The engine may fail as often as it likes."""

_SIZES = EmbeddedConfig(kv_cache_tokens=8192)


def main(base: str, inventory_path: Path) -> NoReturn:
    """Fork a server for each order, until there are no more; then end those that still run."""
    torch.set_num_threads(1)
    inventory, tokenizer = read_inventory(inventory_path), load_tokenizer(base)
    _warm_up(inventory, tokenizer)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a server that has ended
    started = []
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        listener = bind("127.0.0.1", 0)
        pid = os.fork()
        if pid == 0:
            _be_server(order, listener, base, inventory, tokenizer)
        started.append(pid)
        print(json.dumps({"pid": pid, "port": listener.getsockname()[1]}), flush=True)
        listener.close()  # or connections to a killed server would be accepted, and never served
    for pid in started:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(0)  # extension modules would complain of what is frozen


def _warm_up(inventory: Inventory, tokenizer: PreTrainedTokenizerBase) -> None:
    """Build an application once, so that no server has to import what only a first one does."""
    with TemporaryDirectory() as folder:
        registry = TaskRegistry(Database(f"sqlite:///{folder}/registry.db"), inventory)
        create_app(ServerConfig(model=MODEL), EchoEngine(), registry, tokenizer)
        registry.close()
    gc.collect()
    gc.freeze()  # or a server's collector would walk through it, and copy every page of it


def _be_server(
    order: Mapping[str, Any],
    listener: socket.socket,
    base: str,
    inventory: Inventory,
    tokenizer: PreTrainedTokenizerBase,
) -> NoReturn:
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # Not this process's streams: the parent's answers go through them.
        output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.close(0)
        _serve(order, listener, base, inventory, tokenizer)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        Path(order["output"]).with_suffix(".status").write_text(str(status))
        os._exit(status)  # what the parent has set up is the parent's to end


def _serve(
    order: Mapping[str, Any],
    listener: socket.socket,
    base: str,
    inventory: Inventory,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    defects: list[str] = order["defects"]
    settings = RegistryConfig(keep_versions=order["keep_versions"])
    registry = TaskRegistry(Database(order["url"]), inventory, settings)
    hoard = plant_in_registry(registry, defects)
    engine = plant_in_engine(_engine(order, base, inventory), registry, defects)
    engine = plant_in_stressed_engine(engine, defects)
    digests = tuple(hashlib.sha256(key.encode()).digest() for key in order["keys"])
    config = ServerConfig(model=MODEL, drain_seconds=5, api_key_digests=digests)
    app = create_app(replace(config, **order["settings"]), engine, registry, tokenizer)
    plant_in_app(app, registry, defects)
    plant_in_stressed_app(app, engine, defects)
    install_probe(Path(order["output"]).with_suffix(".probe"))
    registry.start()
    try:
        run(app, listener, app.state.context.config, lambda: None)
    finally:
        registry.close()
        hoard.clear()


def _engine(order: Mapping[str, Any], base: str, inventory: Inventory) -> Engine:
    kind = order["engine"]
    if kind == "stub":
        stub = StubSettings(**order["stub"])
        return EngineClient(STUB, asdict(stub), stub.most_running, SUPERVISION)
    if kind == "hosted":
        settings = EngineSettings(
            base=base,
            inventory=str(inventory.path),
            inventory_sha256=inventory.sha256,
            dtype=Dtype.float32,
            device=Device.cpu,
            embedded=_SIZES,
            vllm=VllmEngineConfig(),
        )
        builder = BUILDERS[EngineName.embedded]
        return EngineClient(builder, settings.packed(), _SIZES.max_running, SUPERVISION)
    if kind == "embedded":
        adapted = load_experts(inventory, load_base(base, torch.float32))
        return EmbeddedEngine(adapted, inventory, _SIZES)
    return EchoEngine()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
