"""How the server and its engine are set up. The command line's defaults are read from here."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path


class Dtype(StrEnum):
    """What the model computes in."""

    bfloat16 = "bfloat16"
    float32 = "float32"


class Device(StrEnum):
    """What the model computes on; auto is CUDA where there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class EngineName(StrEnum):
    """What runs the model."""

    embedded = "embedded"
    vllm = "vllm"


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the embedded engine."""

    max_batch_tokens: int = 512
    """Most tokens, prompts' and completions', in one forward pass."""
    max_running: int = 64
    """Most requests that generate at the same time; further ones wait."""
    slots: int = 1024
    """Rows of the routing table: most different task versions in use at the same time."""
    state_bytes: int = 512 << 20
    """What may be kept of single tasks in use, such as their composed adapters; with 0, rank-space
    methods run every step with the whole inventory."""
    kv_cache_tokens: int = 16384
    """Tokens whose keys and values fit in the cache, of all running requests together. Allocated
    at start: for SmolLM2-135M 23 KB a token in bfloat16, 46 KB in float32."""


@dataclass(frozen=True)
class VllmConfig:
    """Sizes of the vLLM engine; what is not here is vLLM's default."""

    max_batch_tokens: int = 2048
    max_running: int = 128
    slots: int = 1024
    """Rows of the routing table: most different task versions in use at the same time."""
    max_context: int | None = None
    """Without, as much as the model was made for."""
    state_bytes: int = 512 << 20
    """As in EngineConfig, on every rank."""
    kv_cache_bytes: int = 2 << 30
    eager: bool = False
    """Run without compiling: starts sooner."""
    tensor_parallel: int = 1


@dataclass(frozen=True)
class ServerConfig:
    """What the HTTP layer needs to know."""

    model: str
    """The base model's id, as /v1/models and the `model` field show it."""
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_digests: tuple[bytes, ...] = field(default=(), repr=False)
    """sha256 of every key that is let in; none lets everybody in."""
    max_in_flight: int = 256
    """Completions admitted and not finished, running ones included; beyond it, 429."""
    max_body_bytes: int = 1 << 20
    max_header_bytes: int = 16 << 10
    max_headers: int = 100
    drain_seconds: int = 30
    """How long running requests may take after SIGTERM."""


@dataclass(frozen=True)
class Launch:
    """What a server is made of: everything that `polyrex serve` was told."""

    server: ServerConfig
    tasks_folder: Path
    inventory: Path | None = None
    """Without one, the inventory that is shipped for the base model."""
    dtype: Dtype = Dtype.float32
    device: Device = Device.auto
    engine: EngineName = EngineName.embedded
    engine_config: EngineConfig = EngineConfig()
    vllm_config: VllmConfig = VllmConfig()
