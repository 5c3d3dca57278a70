"""Fits a task to a few rows while the server runs, in a worker process that yields to the engine.

The server knows the worker by its module name alone: training and server meet through files. The
worker has its own interpreter and a lower priority, so that neither the event loop nor the engine
waits for it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from polyrex.adapters.errors import TaskExists, UnknownTask
from polyrex.server.errors import FitFailed, InvalidRequest, Overloaded
from polyrex.server.registry.principal import Principal
from polyrex.server.registry.registration import Registered
from polyrex.server.registry.registry import TaskRegistry

from .bodies import FitRequest

Event = dict[str, Any]
"""One step of a fit, as JSON: `event` says which, the worker defines the rest."""

COMMAND = (sys.executable, "-P", "-m", "polyrex.training.fit_worker")


class Fitter:
    """Fits one task at a time, and registers it if it beats the base model."""

    def __init__(self, base: str, registry: TaskRegistry, device: str) -> None:
        """On a card, a fit takes no memory that the engine may need: the worker sees to that."""
        self._base = base
        self._device = device
        self._registry = registry
        self._busy = False

    @contextmanager
    def admit(self, asker: Principal, name: str, body: FitRequest) -> Iterator[None]:
        """Occupy the fitter while the context lasts; refuse at once what would fail in the end.

        Raises Overloaded while another task is being fitted, TaskExists where the name is taken
        and is not to be replaced, InvalidRequest where the method has no routing to fit.
        """
        if self._busy:
            raise Overloaded("another task is being fitted; one is at a time")
        self._check(asker, name, body)
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _check(self, asker: Principal, name: str, body: FitRequest) -> None:
        if not self._registry.inventory.routing_shape[1]:
            raise InvalidRequest("the inventory's method has no routing that could be fitted")
        try:
            self._registry.find(asker, name)
        except UnknownTask:
            return
        if not body.replace:
            raise TaskExists(f"task {name} is there already; send replace to give it a new version")

    async def fit(
        self, asker: Principal, name: str, body: FitRequest
    ) -> AsyncGenerator[Event | Registered, None]:
        """Yield the worker's events, and last the task as registered, or the event `refused`.

        Closing the generator ends the worker. Raises FitFailed where the worker failed.
        """
        with tempfile.TemporaryDirectory(prefix="polyrex-fit-") as folder:
            out = Path(folder) / "router.safetensors"
            scored: Event = {}
            async with aclosing(self._work(name, body, out)) as events:
                async for event in events:
                    yield event
                    scored = event
            if scored["adapted"] <= scored["base"]:
                reason = "the fitted task does no better on the rows held out than the base"
                yield scored | {"event": "refused", "reason": reason}
                return
            data = out.read_bytes()
            register = self._registry.register
            yield await asyncio.to_thread(register, asker, name, data, replace=body.replace)

    async def _work(self, name: str, body: FitRequest, out: Path) -> AsyncGenerator[Event, None]:
        """Run the worker and yield its events; the last one is `scored`."""
        job = {
            "base": self._base,
            "inventory": str(self._registry.inventory.path),
            "task": name,
            "instruction": body.instruction,
            "rows": [row.to_json() for row in body.rows],
            "out": str(out),
            "device": self._device,
        }
        async with _process() as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(job).encode())
            process.stdin.close()
            event: Event = {}
            async for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "failed":
                    raise FitFailed(event["message"])
                yield event
            if event.get("event") != "scored":
                raise FitFailed(f"the worker ended with status {await process.wait()}")


@asynccontextmanager
async def _process() -> AsyncGenerator[asyncio.subprocess.Process, None]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*COMMAND, stdin=pipe, stdout=pipe)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
