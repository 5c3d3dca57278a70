"""The settings of `polyrex serve`.

Every field here is a flag, an environment variable and a key of a TOML file: the command line is
made from these classes, and the docstring below a field is its help text.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter
from cyclopts.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from cyclopts.validators import Number

FLAT = Parameter(name="*")
"""The fields of this dataclass are options without a prefix."""

_MODEL = Parameter(group=Group("Model and engine", sort_key=1))
_SERVER = Parameter(group=Group("Server", sort_key=2))
_LIMITS = Parameter(group=Group("Limits", sort_key=3))
_REGISTRY = Parameter(group=Group("Registry", sort_key=3))
_EMBEDDED = Parameter(group=Group("Embedded engine", sort_key=4))
_VLLM = Parameter(group=Group("vLLM engine", sort_key=5))


Slots = Annotated[int, Parameter(validator=Number(gte=2))]
"""One slot is the base model's; a task needs another."""


class Dtype(StrEnum):
    """The data type that the model computes in."""

    bfloat16 = "bfloat16"
    float32 = "float32"


class Device(StrEnum):
    """The device that the model runs on; auto is CUDA where there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class EngineName(StrEnum):
    """The engine that runs the model."""

    embedded = "embedded"
    vllm = "vllm"


class LogFormat(StrEnum):
    """The form of log lines: JSON for collectors, text for people."""

    json = "json"
    text = "text"


@dataclass(frozen=True)
class EmbeddedConfig:
    """How the embedded engine runs."""

    max_batch_tokens: PositiveInt = 512
    """Most tokens, of prompts and completions, in one forward pass."""
    max_running: PositiveInt = 64
    """Most requests that generate at the same time; further ones wait."""
    slots: Slots = 1024
    """Rows of the routing table: most task versions in use at the same time."""
    state_bytes: NonNegativeInt = 512 << 20
    """Bytes kept of single tasks in use, such as their composed adapters; with 0, rank-space
    methods run every step with the whole inventory."""
    kv_cache_tokens: PositiveInt = 16384
    """Tokens whose keys and values fit in the cache, of all running requests together. Allocated
    at start: for SmolLM2-135M 23 KB a token in bfloat16, 46 KB in float32."""
    prefix_cache: bool = True
    """Keep the keys and values of prompts and completions while there is room, for later prompts of
    the same tenant and task that begin alike."""
    cuda_graphs: bool = True
    """On a GPU, record decode steps as CUDA graphs at start, and replay them."""


@dataclass(frozen=True)
class VllmEngineConfig:
    """Sizes of the vLLM engine; everything else is vLLM's default."""

    max_batch_tokens: PositiveInt = 2048
    """Most tokens, of prompts and completions, in one forward pass."""
    max_running: PositiveInt = 128
    """Most requests that generate at the same time; further ones wait."""
    slots: Slots = 1024
    """Rows of the routing table: most task versions in use at the same time."""
    max_context: PositiveInt | None = None
    """Longest prompt and completion together; the model's own limit if not given."""
    state_bytes: NonNegativeInt = 512 << 20
    """Bytes kept of single tasks in use, on every rank; on CUDA at least those of `max_running`."""
    kv_cache_bytes: PositiveInt = 2 << 30
    """Bytes of the cache of keys and values, on every rank."""
    eager: Annotated[bool, Parameter(alias="--eager")] = False
    """Run without compiling and without CUDA graphs: starts sooner, answers more slowly."""
    tensor_parallel: Annotated[PositiveInt, Parameter(alias="--tensor-parallel")] = 1
    """Ranks that share the model."""
    experimental_graphs: bool = False
    """On a GPU, let CUDA graphs of decode steps hold the adapters too. It has not run on a GPU
    yet."""


@dataclass(frozen=True)
class ServerConfig:
    """The settings of the HTTP layer."""

    model: Annotated[str, _MODEL, Parameter(name="base")] = "smollm2-135m-instruct"
    """The base model: a name, or a folder in Hugging Face's format. Clients see it as the model's
    id."""
    fit_device: Annotated[Device, _MODEL] = Device.auto
    """Device that tasks are fitted on; auto is that of the engine, or the CPU where a card has no
    room for the model a second time."""
    host: Annotated[str, _SERVER] = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, _SERVER, Parameter(validator=Number(gte=1, lte=65535))] = 8000
    """Port to listen on."""
    api_key_digests: Annotated[tuple[bytes, ...], Parameter(parse=False)] = field(
        default=(), repr=False
    )
    """sha256 of every API key, read from --api-key-file; with none, everybody is let in."""
    allowed_hosts: Annotated[tuple[str, ...], _SERVER] = ()
    """Names that the Host header of a request may have, with any port. If not given, any; but only
    those of this machine where the server listens on loopback and asks for no API keys, so that no
    web page can use it."""
    lora_dir: Annotated[Path | None, _SERVER] = None
    """Folder whose routers POST /v1/load_lora_adapter may load; without it, it loads none."""
    max_in_flight: Annotated[PositiveInt, _LIMITS] = 256
    """Most completions that run or wait for a place in the engine; beyond it, 429 or 503. A tenant
    may have three times as many as it leaves free: alone, three quarters of them."""
    max_queued_tokens: Annotated[PositiveInt, _LIMITS] = 1 << 18
    """Most tokens of completions that wait for a place, by estimate; a tenant's part of them is as
    that of max_in_flight. One request may always wait."""
    max_queue_seconds: Annotated[PositiveFloat, _LIMITS] = 10.0
    """Seconds that a request may wait for a place; it is refused at once where it would wait
    longer. Where a tenant goes on asking for more than twice its share, its requests may wait as
    long as the engine takes to a first token."""
    max_body_bytes: Annotated[PositiveInt, _LIMITS] = 1 << 20
    """Largest body of a request; beyond it, 413."""
    max_header_bytes: Annotated[PositiveInt, _LIMITS] = 16 << 10
    """Most bytes of a request's headers; beyond it, 431."""
    max_headers: Annotated[PositiveInt, _LIMITS] = 100
    """Most headers of a request; beyond it, 431."""
    max_connections: Annotated[PositiveInt, _LIMITS] = 2048
    """Most open connections; beyond it, 503 for all but /livez and /readyz. Fewer where the limit
    of descriptors is low."""
    max_address_connections: Annotated[PositiveInt, _LIMITS] = 1024
    """Most open connections of one client address, which may be a proxy; beyond it, 503."""
    header_seconds: Annotated[PositiveFloat, _LIMITS] = 10.0
    """Seconds that a request's headers may take to arrive, and a new connection may be idle."""
    body_seconds: Annotated[PositiveFloat, _LIMITS] = 60.0
    """Seconds that a body may take to arrive. After the first header_seconds it must also have come
    at 1 KiB a second."""
    keep_alive_seconds: Annotated[PositiveFloat, _LIMITS] = 5.0
    """Seconds that a connection may be idle between requests."""
    write_seconds: Annotated[PositiveFloat, _LIMITS] = 30.0
    """Seconds that a client may read nothing of what waits for it; then its request is ended."""
    request_seconds: Annotated[PositiveFloat, _LIMITS] = 300.0
    """Seconds from a request's last byte to the last byte of its answer; beyond it, 504. A client
    may ask for fewer in the header x-polyrex-timeout. Fitting a task has fit_seconds."""
    drain_seconds: Annotated[NonNegativeFloat, _LIMITS] = 30.0
    """Seconds that running requests may take after SIGTERM, while new ones get 503."""
    engine_stall_seconds: Annotated[PositiveFloat, _LIMITS] = 60.0
    """Seconds that the engine may make no progress with requests in it; then its process is
    killed and started again. More where one step takes long: a large model on a CPU."""
    fit_seconds: Annotated[PositiveInt, _LIMITS] = 1800
    """Seconds that fitting a task may take; beyond it, the fit ends with an error."""


@dataclass(frozen=True)
class RegistryConfig:
    """Where tasks, tenants and keys are kept."""

    url: Annotated[str | None, Parameter(alias="--registry")] = None
    """Database: sqlite:///FILE, or postgresql://USER@HOST/NAME, which replicas may share; a file in
    the folder of tasks if not given. A password belongs in the environment variable or in
    ~/.pgpass."""
    retention_days: NonNegativeInt = 30
    """Days that a dropped task can be undeleted."""
    keep_versions: PositiveInt = 1000
    """Most versions kept of a task; older ones go, unless something names them."""


def default_tasks_folder() -> Path:
    """The folder of registered tasks: polyrex/tasks in the user's state folder."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "polyrex" / "tasks"


@dataclass(frozen=True)
class Launch:
    """Everything that `polyrex serve` is told."""

    server: Annotated[ServerConfig, FLAT] = ServerConfig()
    tasks_folder: Annotated[Path, _MODEL, Parameter(name="tasks-dir")] = field(
        default_factory=default_tasks_folder
    )
    """Folder where registered tasks are kept."""
    registry: Annotated[RegistryConfig, _REGISTRY] = RegistryConfig()
    inventory: Annotated[Path | None, _MODEL] = None
    """File of the inventory; the one shipped for the base model if not given."""
    dtype: Annotated[Dtype, _MODEL] = Dtype.float32
    """Data type that the model computes in."""
    device: Annotated[Device, _MODEL] = Device.auto
    """Device that the model runs on; auto is CUDA where there is one."""
    engine: Annotated[EngineName, _MODEL] = EngineName.embedded
    """Engine that runs the model."""
    embedded: Annotated[EmbeddedConfig, _EMBEDDED] = EmbeddedConfig()
    vllm: Annotated[VllmEngineConfig, _VLLM] = VllmEngineConfig()
    api_key_file: Annotated[Path | None, _SERVER] = None
    """File of API keys, one a line; every route but /livez and /readyz then asks for one."""
    insecure: Annotated[bool, _SERVER] = False
    """Listen on addresses that others can reach without asking for API keys."""
    log_format: Annotated[LogFormat | None, _SERVER] = None
    """Form of the log on standard error; if not given, text on a terminal and JSON elsewhere."""
