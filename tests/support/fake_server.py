"""A deterministic fake engine behind a real HTTP server, to test the server alone."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.files.inventory import Inventory
from polyrex.server.config import ServerConfig
from polyrex.server.engines.base import EngineStats, GenerationRequest, Token, TokenChunk
from polyrex.server.errors import EngineStopped
from polyrex.server.http.app import create_app
from polyrex.server.launch.process import Server, bind
from polyrex.server.observability.tracing import Traces
from polyrex.server.registry.database import Database
from polyrex.server.registry.registry import TaskRegistry
from polyrex.server.requests.prompt_routing import PromptIntuition


@dataclass
class FakeEngine:
    """Repeats `reply`, one token per chunk; can be told to misbehave."""

    reply: tuple[int, ...] = (28, 29, 30)
    context_length: int = 256
    most_running: int = 256
    eos: bool = False  # end after one reply, with "stop"
    failure: Exception | None = None  # raised after two tokens, or at start
    hang: bool = False  # after two tokens, until the request is aborted
    impossible: bool = False  # log-probabilities are minus infinity
    down: bool = False
    start_delay: threading.Event | None = None  # start returns when it is set
    requests: list[GenerationRequest] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    aborted: list[str] = field(default_factory=list)

    async def start(self) -> None:
        while self.start_delay is not None and not self.start_delay.is_set():
            await asyncio.sleep(0.01)
        if self.down and self.failure is not None:
            raise self.failure

    async def stop(self) -> None:
        self.down = True

    def check(self) -> None:
        if self.down:
            raise EngineStopped("the engine is down")

    def stats(self) -> EngineStats:
        return EngineStats(len(self.running), 0, 0.5, 3, 7, 11, 13, {"composed": 5})

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        self.check()
        self.requests.append(request)
        self.running.add(request.id)
        finished = False
        try:
            sampling = request.sampling
            count = min(sampling.max_tokens, len(self.reply)) if self.eos else sampling.max_tokens
            for index in range(count):
                if index == 2 and self.failure is not None:
                    raise self.failure
                if index == 2 and self.hang:
                    await asyncio.Event().wait()
                await asyncio.sleep(0)
                prompt = _prompt(request) if index == 0 else None
                token = _token(self.reply[index % len(self.reply)], sampling.logprobs)
                if self.impossible:
                    token = Token(token.id, -math.inf, ((token.id, -math.inf),))
                yield TokenChunk((token,), None, prompt)
            finished = True
            yield TokenChunk(
                (), "stop" if self.eos else "length", None if count else _prompt(request)
            )
        finally:
            self.running.discard(request.id)
            if not finished:
                self.aborted.append(request.id)


def _prompt(request: GenerationRequest) -> tuple[Token, ...] | None:
    wanted = request.sampling.prompt_logprobs
    if wanted is None:
        return None
    first, *rest = request.prompt
    return (Token(first), *(_token(token, wanted) for token in rest))


def _token(token_id: int, logprobs: int | None) -> Token:
    if logprobs is None:
        return Token(token_id)
    best = tuple((token_id + i, -0.25 - i) for i in range(logprobs))
    return Token(token_id, -0.25, best)


@dataclass
class Served:
    """A running server."""

    url: str
    client: httpx.Client
    engine: FakeEngine
    tasks_folder: Path
    registry: TaskRegistry
    server: Server

    @property
    def port(self) -> int:
        """Where it listens on 127.0.0.1."""
        return self.client.base_url.port or 0

    def complete(self, **body: object) -> httpx.Response:
        """POST /v1/completions."""
        return self.client.post("/v1/completions", json={"prompt": "Hello", **body})


Serve = Callable[..., Served]


@contextmanager
def serving(
    folder: Path,
    inventory: Inventory,
    tokenizer: PreTrainedTokenizerBase,
    engine: FakeEngine,
    intuition: PromptIntuition | None = None,
    traces: Traces | None = None,
    **changes: Any,
) -> Iterator[Served]:
    """Run a server while the context lasts; `changes` are fields of ServerConfig."""
    registry = TaskRegistry(Database(f"sqlite:///{folder / 'registry.db'}"), inventory)
    config = replace(ServerConfig(model="base"), **{"drain_seconds": 1.0} | changes)
    app = create_app(config, engine, registry, tokenizer, intuition, traces)
    listener = bind(config.host, 0)
    server = Server(app, config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    settled = app.state.context.readiness.settled
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        try:
            while engine.start_delay is None and not settled.is_set():
                client.get("/livez")
            yield Served(url, client, engine, folder, registry, server)
        finally:
            server.should_exit = True
            client.close()
            thread.join()
