"""The process that `bench.http.overhead` measures: the application on an engine that costs nothing.

It says its port on one line, serves until SIGTERM, and with a profile writes where its time went.
"""

from __future__ import annotations

import asyncio
import cProfile
import gc
import json
import os
import pstats
import sys
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass
from pathlib import Path

from polyrex.adapters.model.base_model import load_tokenizer
from polyrex.server.config import ServerConfig
from polyrex.server.engines.base import GenerationRequest, Token, TokenChunk
from polyrex.server.http.app import create_app
from polyrex.server.launch.process import Server, bind
from polyrex.server.registry.database import Database
from polyrex.server.registry.registry import TaskRegistry
from support.reliability.small_base import SmallBase
from support.reliability.stress.stub_engine import StubEngine, StubSettings

STREAMS = 200


@dataclass(frozen=True)
class Order:
    """How the process serves."""

    folder: str
    """Where it writes what it needs."""
    parser: str = "ours"
    """ours (httptools), or one of uvicorn's own: httptools, h11."""
    step_seconds: float = 0.2
    """Between two tokens of a stream."""
    core: int | None = None
    """The only core that it may use."""
    profile: str | None = None
    """File for where the time went; the profiler takes as much again."""

    def to_json(self) -> str:
        """As the process is told."""
        return json.dumps(asdict(self))


class InstantEngine(StubEngine):
    """Answers a request for few tokens at once; steps through others."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Yield all tokens in one chunk where there are at most 16."""
        count = request.sampling.max_tokens
        if count <= 16:
            yield TokenChunk(tuple(Token(index % 16) for index in range(count)), "length")
            return
        async for chunk in super().generate(request):
            yield chunk


def serve(order: Order) -> None:
    """Serve as ordered, until SIGTERM."""
    if order.core is not None:
        os.sched_setaffinity(0, {order.core})
    small = SmallBase.write(Path(order.folder))
    database = Database(f"sqlite:///{order.folder}/registry.db")
    registry = TaskRegistry(database, small.read_inventory())
    config = ServerConfig(model="base", max_in_flight=2 * STREAMS)
    engine = InstantEngine(StubSettings(order.step_seconds, most_running=STREAMS))
    app = create_app(config, engine, registry, load_tokenizer(str(small.base)))
    with bind("127.0.0.1", 0) as listener:
        server = Server(app, config)
        if order.parser != "ours":
            server.config.http = order.parser
        gc.collect()
        gc.freeze()  # as launch/process.py does
        print(listener.getsockname()[1], flush=True)
        asyncio.run(server.serve([listener]))


def breakdown(profile: cProfile.Profile) -> dict[str, float]:
    """The share of the time that each package, or file of ours, took itself."""
    seconds: Counter[str] = Counter()
    for (file, _, function), entry in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        seconds[_owner(file, function)] += entry[2]
    seconds.pop("waiting", None)
    total = sum(seconds.values())
    return {name: round(value / total, 4) for name, value in seconds.most_common(30)}


def _owner(file: str, function: str) -> str:
    if "select.epoll" in function:
        return "waiting"
    if file == "~":
        return f"builtin {function}"
    for mark in ("/site-packages/", "/lib/python"):
        if mark in file:
            below = file.partition(mark)[2].split("/")
            return below[0] if mark == "/site-packages/" else "/".join(below[1:3])
    parts = Path(file).parts
    root = max((parts.index(name) for name in ("server", "tests") if name in parts), default=0)
    return "/".join(parts[root:])


def main() -> None:
    """Serve as the argument says."""
    order = Order(**json.loads(sys.argv[1]))
    if order.profile is None:
        serve(order)
        return
    profile = cProfile.Profile()
    profile.runcall(serve, order)
    Path(order.profile).write_text(json.dumps(breakdown(profile)))


if __name__ == "__main__":
    main()
