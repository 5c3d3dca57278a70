"""Engines for the engine's process: stubs that start, crash and hang as their settings say."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from polyrex.server.engines.base import Engine
from polyrex.server.engines.process.client import EngineClient, Supervision
from polyrex.server.errors import StartError
from support.reliability.stress.stub_engine import StubEngine, StubSettings

TESTS = Path(__file__).parents[2]
QUICK = Supervision(pauses=(0.0, 0.1, 0.2))
BAD_STATUS = 9
SECONDS = 60
"""Far more than anything here takes."""


def build_stub(settings: Mapping[str, Any]) -> Engine:
    """A stub engine; its starts are counted by the lines of a file.

    `bad_starts` are the numbers, from 1, of those that end the process; a start waits while the
    file `slow` is there. `error` is what it cannot start for.
    """
    folder = Path(settings["folder"])
    with (folder / "starts").open("a") as starts:
        starts.write(f"{os.getpid()}\n")
    while (folder / "slow").exists():
        time.sleep(0.01)
    if len(started(folder)) in settings["bad_starts"]:
        os._exit(BAD_STATUS)
    if settings["error"]:
        raise StartError(settings["error"])
    return StubEngine(StubSettings(**settings["stub"]))


def started(folder: Path) -> list[int]:
    """The processes that have begun to build their engines."""
    return [int(line) for line in (folder / "starts").read_text().split()]


def stub_client(
    folder: Path,
    supervision: Supervision = QUICK,
    bad_starts: tuple[int, ...] = (),
    error: str = "",
    **stub: Any,
) -> EngineClient:
    """A client of a stub engine in a process of its own; `stub` are fields of StubSettings."""
    stub = {"step_seconds": 0.005, "most_running": 256} | stub
    settings = {"folder": str(folder), "bad_starts": bad_starts, "error": error, "stub": stub}
    return EngineClient(f"{__name__}:build_stub", settings, stub["most_running"], supervision)


@asynccontextmanager
async def started_client(client: EngineClient) -> AsyncIterator[EngineClient]:
    """Start an engine's process, and stop it at the end."""
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


def runs(pid: int) -> bool:
    """Whether a process is there, and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = SECONDS) -> bool:
    """Whether the condition came to hold."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
