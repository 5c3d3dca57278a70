"""Fits a task to a few rows while the server runs, in a worker process that yields to the engine.

The server knows the worker by its module name alone: training and server meet through files. The
worker has its own interpreter and a lower priority, so that neither the event loop nor the engine
waits for it. It ends when its stdin is closed, which happens to it however the server ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from polyrex.server.errors import FitFailed, InvalidRequest, Overloaded
from polyrex.server.registry.principal import Principal
from polyrex.server.registry.registration import Registered
from polyrex.server.registry.registry import TaskRegistry
from polyrex.server.registry.rows import Expected

from .bodies import FitRequest
from .database_calls import DatabaseCalls

T = TypeVar("T")

Event = dict[str, Any]
"""One step of a fit, as JSON: `event` says which, the worker defines the rest."""

COMMAND = (sys.executable, "-P", "-m", "polyrex.training.fit_worker")

# The server has the base model already: a request must not make this machine ask for it elsewhere.
_OFFLINE = {"HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class WantedFit:
    """A task that somebody wants to be fitted, and what its registration depends on."""

    asker: Principal
    name: str
    body: FitRequest
    expected: Expected = None
    idempotency_key: str | None = None


class Fitter:
    """Fits one task at a time, and registers it if it beats the base model."""

    def __init__(
        self,
        base: str,
        registry: TaskRegistry,
        reads: DatabaseCalls,
        writes: DatabaseCalls,
        device: str,
        seconds: int,
    ) -> None:
        """`seconds`: most that a fit may take.

        On a card, a fit takes no memory that the engine may need: the worker sees to that.
        """
        self._base = base
        self._device = device
        self._seconds = seconds
        self._registry = registry
        self._reads = reads
        self._writes = writes
        self._busy = False

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Occupy the fitter while the context lasts.

        Raises Overloaded while another task is being fitted.
        """
        if self._busy:
            raise Overloaded("another task is being fitted; one is at a time")
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    async def check(self, wanted: WantedFit) -> None:
        """Refuse what would fail after the fit.

        Raises InvalidRequest where the method has no routing to fit, or what
        `TaskRegistry.check_registration` raises.
        """
        if not self._registry.inventory.routing_shape[1]:
            raise InvalidRequest("the inventory's method has no routing that could be fitted")
        await self._reads.run(
            self._registry.check_registration,
            wanted.asker,
            wanted.name,
            replace=wanted.body.replace,
            expected=wanted.expected,
            idempotency_key=wanted.idempotency_key,
        )

    async def fit(self, wanted: WantedFit) -> AsyncGenerator[Event | Registered, None]:
        """Yield the worker's events, and last the task as registered, or the event `refused`.

        Closing the generator ends the worker. Raises FitFailed where the worker failed, or took too
        long.
        """
        # The file has no name: it is gone with the processes, however they end.
        with tempfile.TemporaryFile() as router:
            scored: Event = {}
            async with aclosing(self._work(wanted, router.fileno())) as events:
                async for event in events:
                    yield event
                    scored = event
            if scored["adapted"] <= scored["base"]:
                reason = "the fitted task does no better on the rows held out than the base"
                yield scored | {"event": "refused", "reason": reason}
                return
            router.seek(0)
            data = router.read()
            yield await self._writes.run(
                self._registry.register,
                wanted.asker,
                wanted.name,
                data,
                replace=wanted.body.replace,
                expected=wanted.expected,
                idempotency_key=wanted.idempotency_key,
            )

    async def _work(self, wanted: WantedFit, out: int) -> AsyncGenerator[Event, None]:
        """Run the worker and yield its events; the last one is `scored`.

        `out`: the descriptor of the file that the router goes to.
        """
        deadline = asyncio.get_running_loop().time() + self._seconds
        async with _process(out) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(self._job(wanted, out)).encode() + b"\n")
            event: Event = {}
            while line := await self._until(deadline, process.stdout.readline()):
                event = json.loads(line)
                if event["event"] == "failed":
                    raise FitFailed(event["message"])
                yield event
            status = await self._until(deadline, process.wait())
            if event.get("event") != "scored":
                raise FitFailed(f"the worker ended with status {status}")

    def _job(self, wanted: WantedFit, out: int) -> dict[str, Any]:
        return {
            "base": self._base,
            "inventory": str(self._registry.inventory.path),
            "task": wanted.name,
            "instruction": wanted.body.instruction,
            "rows": [row.to_json() for row in wanted.body.rows],
            "out": f"/dev/fd/{out}",
            "device": self._device,
        }

    async def _until(self, deadline: float, work: Awaitable[T]) -> T:
        """Await something of the worker; raises FitFailed at the deadline."""
        try:
            async with asyncio.timeout_at(deadline):
                return await work
        except TimeoutError as error:
            raise FitFailed(f"the fit took more than {self._seconds} s, and was ended") from error


@asynccontextmanager
async def _process(out: int) -> AsyncGenerator[asyncio.subprocess.Process, None]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *COMMAND, stdin=pipe, stdout=pipe, pass_fds=(out,), env=os.environ | _OFFLINE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
