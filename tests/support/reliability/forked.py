"""The process behind ForkServer: reads one order a line, and forks a server for each.

It must have one thread when it forks, and no database: every server opens its own.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import torch
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.files.inventory import Inventory, load_experts, read_inventory
from polyrex.adapters.model.base_model import load_base, load_tokenizer
from polyrex.server.config import EmbeddedConfig, RegistryConfig, ServerConfig
from polyrex.server.engines.base import Engine
from polyrex.server.engines.embedded.engine import EmbeddedEngine
from polyrex.server.http.app import create_app
from polyrex.server.launch.process import bind, run
from polyrex.server.registry.database import Database
from polyrex.server.registry.registry import TaskRegistry

from .engines import EchoEngine
from .planted import plant_in_app, plant_in_engine, plant_in_registry

MODEL = "small"
"""The name of the base model in requests."""


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
    engine: Engine = EchoEngine()
    if order["engine"] == "embedded":
        adapted = load_experts(inventory, load_base(base, torch.float32))
        engine = EmbeddedEngine(adapted, inventory, EmbeddedConfig(kv_cache_tokens=8192))
    engine = plant_in_engine(engine, registry, defects)
    config = ServerConfig(model=MODEL, drain_seconds=5)
    app = create_app(config, engine, registry, tokenizer)
    plant_in_app(app, registry, defects)
    registry.start()
    try:
        run(app, listener, config, lambda: None)
    finally:
        registry.close()
        hoard.clear()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
