"""From names on the command line to an application: model, inventory, tasks, engine."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from fastapi import FastAPI

from polyrex.adapters.errors import FileError
from polyrex.adapters.files.bundle import INVENTORY, Bundle
from polyrex.adapters.files.examples import Example, read_examples
from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.model.base_model import load_tokenizer, resolve_base
from polyrex.adapters.model.devices import pick_device
from polyrex.server.config import Device, EngineName, Launch, RegistryConfig, ServerConfig
from polyrex.server.engines.building import BUILDERS, EngineSettings
from polyrex.server.engines.process.client import EngineClient, Supervision
from polyrex.server.engines.vllm.version import check_build
from polyrex.server.errors import StartError
from polyrex.server.http.app import create_app
from polyrex.server.registry.database import Database, folder_url
from polyrex.server.registry.files.shipped import register_shipped
from polyrex.server.registry.files.takeover import take_over
from polyrex.server.registry.registry import TaskRegistry
from polyrex.server.requests.prompt_routing import prompt_intuition

from .progress import Progress


@dataclass(frozen=True)
class Loaded:
    """An application whose engine has not started yet, with its tasks and examples of them."""

    app: FastAPI
    registry: TaskRegistry
    examples: tuple[Example, ...]


def load(launch: Launch, progress: Progress) -> Loaded:
    """Load everything that serving needs; raises PolyrexError where the parts do not fit."""
    _check_device(launch)  # first: it may not be there
    lora_dir = launch.server.lora_dir
    if lora_dir is not None and not lora_dir.is_dir():
        raise StartError(f"--lora-dir {lora_dir}: there is no such folder")
    name = launch.server.model
    path = launch.inventory or shipped_inventory(name)
    with progress.stage(f"inventory {path}"):
        bundle = Bundle.read(path)
        inventory = bundle.inventory
        examples = _examples(inventory, progress)
    with progress.stage(f"base model {name}"):
        base = resolve_base(name, progress.say)
        tokenizer = load_tokenizer(base)
    with progress.stage(f"tasks in {launch.tasks_folder}"):
        registry = open_registry(launch.registry, launch.tasks_folder, bundle)
    rejected = len(registry.rejected)
    progress.say(f"{len(registry)} tasks" + (f", {rejected} files rejected" if rejected else ""))
    intuition = prompt_intuition(inventory)
    engine = _engine(launch, base, inventory)
    app = create_app(server_settings(launch), engine, registry, tokenizer, intuition)
    return Loaded(app, registry, examples)


def open_registry(config: RegistryConfig, folder: Path, bundle: Bundle) -> TaskRegistry:
    """Open the registry's database, and bring in what lies in files.

    That is a state folder of before there was a database, and the routers that come with the
    inventory. Raises StartError or StorageError.
    """
    with ExitStack() as undo:
        database = Database(config.url or folder_url(folder))
        undo.callback(database.close)
        rejected = take_over(database, bundle.inventory, folder)
        rejected |= register_shipped(database, bundle.inventory, bundle.folder)
        registry = TaskRegistry(database, bundle.inventory, config, rejected)
        undo.pop_all()  # the registry closes it
    return registry


def server_settings(launch: Launch) -> ServerConfig:
    """The server's settings; where the engine must stay off the cards, fits do as well."""
    if launch.device is Device.cpu and launch.server.fit_device is Device.auto:
        return replace(launch.server, fit_device=Device.cpu)
    return launch.server


def _examples(inventory: Inventory, progress: Progress) -> tuple[Example, ...]:
    """The examples beside the inventory; a file that is none of ours does not stop the server."""
    try:
        return tuple(read_examples(inventory.path))
    except FileError as error:
        progress.say(f"no examples: {error}")
        return ()


def _check_device(launch: Launch) -> None:
    device: str = launch.device
    if launch.engine is EngineName.vllm:
        device = check_build(device).device
    pick_device(device)


def _engine(launch: Launch, base: str, inventory: Inventory) -> EngineClient:
    """The engine, in a process of its own that begins with it."""
    settings = EngineSettings(
        base=base,
        inventory=str(inventory.path.resolve()),
        inventory_sha256=inventory.sha256,
        dtype=launch.dtype,
        device=launch.device,
        embedded=launch.embedded,
        vllm=launch.vllm,
    )
    of_engine = launch.vllm if launch.engine is EngineName.vllm else launch.embedded
    return EngineClient(
        BUILDERS[launch.engine],
        settings.packed(),
        of_engine.max_running,
        Supervision(launch.server.engine_stall_seconds),
    )


def shipped_inventory(base: str) -> Path:
    """The path of the inventory shipped for a base model; raises StartError where there is none."""
    # Found through the resolved path of this file: an editable install links the code alone.
    package = Path(__file__).resolve().parents[2]
    path = package / "adapters" / "shipped" / base / INVENTORY
    if not path.exists():
        raise StartError(f"no inventory comes with polyrex for {base}: give --inventory FILE")
    return path
