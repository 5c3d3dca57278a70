"""The engine's process: `python -m polyrex.server.engines.process.host DESCRIPTOR`.

It builds one engine, passes on requests and tokens, and ends when the engine is down, or when its
server has ended: whatever way the server ended, nothing of the engine outlives it.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from functools import partial
from importlib import import_module
from typing import Any

from polyrex.adapters.errors import PolyrexError
from polyrex.server.engines.base import Engine, EngineStats, TokenChunk
from polyrex.server.engines.threads import in_passing_thread
from polyrex.server.errors import EngineError, EngineStopped

from .failures import pack_failure
from .parent_death import die_with_parent
from .wire import Abort, Down, Generate, Log, Pulse, Ready, Start, ToHost, Tokens, Wire, pack_chunk

logger = logging.getLogger(__name__)

PULSE_SECONDS = 0.2
_LAST_WORDS_SECONDS = 0.5
"""What requests get to tell their ends in, once the engine is down."""


class Host:
    """Runs one engine for one server."""

    def __init__(self) -> None:
        self._wire: Wire[ToHost] = Wire(ToHost, self._receive, self._server_ended)
        self._engine: Engine | None = None
        self._requests: dict[int, asyncio.Task[None]] = {}
        self._chunks: list[tuple[int, bool, bytes]] = []
        self._outcomes = 0
        self._working: set[asyncio.Task[None]] = set()
        self._over = asyncio.Event()
        self._status = 0

    async def run(self, connection: socket.socket) -> None:
        """Serve until the server says stop; where the engine is down, end the process."""
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: self._wire, sock=connection)
        logging.getLogger().addHandler(_ToServer(loop, self._wire.send))
        await self._over.wait()
        for task in self._working:
            task.cancel()
        if self._engine is None or self._status:
            os._exit(self._status)  # without waiting for whatever its threads do
        await self._engine.stop()
        gc.unfreeze()  # or extension modules complain at the end of what was not collected

    def _receive(self, message: ToHost) -> None:
        match message:
            case Generate():
                self._requests[message.number] = asyncio.create_task(self._generate(message))
            case Abort():
                if message.number in self._requests:
                    self._requests[message.number].cancel()
            case Start():
                logging.getLogger().setLevel(message.log_level)
                self._work(self._start(message))
                self._work(self._pulse())
            case _:
                self._over.set()

    def _work(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._working.add(task)
        task.add_done_callback(self._working.discard)

    async def _start(self, message: Start) -> None:
        try:
            module, _, function = message.build.partition(":")
            build: Callable[[dict[str, Any]], Engine] = getattr(import_module(module), function)
            made = partial(in_passing_thread, partial(build, message.settings))
            engine = await asyncio.to_thread(made)
            await engine.start()
        except Exception as error:
            if not isinstance(error, PolyrexError):
                logger.exception("the engine could not be started")
            self._go_down(str(error) or type(error).__name__)
            return
        # What is there now stays: Python's collector need not walk through it again and again.
        gc.collect()
        gc.freeze()
        self._engine = engine
        self._wire.send(Ready(engine.context_length))

    async def _pulse(self) -> None:
        while True:
            stats = EngineStats()
            if self._engine is not None:
                try:
                    self._engine.check()
                except EngineStopped as error:
                    if self._requests:
                        await asyncio.wait(self._requests.values(), timeout=_LAST_WORDS_SECONDS)
                    self._go_down(str(error))
                    return
                stats = self._engine.stats()
            self._wire.send(Pulse(stats, self._outcomes))
            await asyncio.sleep(PULSE_SECONDS)

    def _go_down(self, reason: str) -> None:
        self._wire.send(Down(reason))
        self._status = 1
        self._over.set()

    async def _generate(self, message: Generate) -> None:
        number, finish = message.number, None
        try:
            if self._engine is None:
                raise EngineStopped("the engine is starting")
            async with aclosing(self._engine.generate(message.unpack())) as chunks:
                async for chunk in chunks:
                    finish = chunk.finish_reason
                    self._put(number, chunk)
            if finish is None:
                raise EngineError(f"the engine ended {message.id} without a finish reason")
        except Exception as error:
            self._flush()  # what came before
            self._outcomes += 1
            self._wire.send(pack_failure(number, message.id, error))
        finally:
            del self._requests[number]

    def _put(self, number: int, chunk: TokenChunk) -> None:
        """Send a chunk together with the others of its step.

        A step wakes all its requests in one turn of the loop; in the next one, all have been here.
        """
        if not self._chunks:
            asyncio.get_running_loop().call_soon(self._flush)
        self._chunks.append((number, chunk.finish_reason is not None, pack_chunk(chunk)))
        self._outcomes += 1

    def _flush(self) -> None:
        chunks, self._chunks = self._chunks, []
        if chunks:
            self._wire.send(Tokens(chunks))

    def _server_ended(self) -> None:
        if self._over.is_set():
            return
        if os.getpgrp() == os.getpid():  # so the group is this process and what the engine started
            os.killpg(0, signal.SIGKILL)
        os._exit(1)


class _ToServer(logging.Handler):
    """Sends what is logged here to the server's log."""

    def __init__(self, loop: asyncio.AbstractEventLoop, send: Callable[[Log], None]) -> None:
        super().__init__()
        self._loop = loop
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        line = Log(record.name, record.levelno, self.format(record))
        try:
            self._loop.call_soon_threadsafe(self._send, line)
        except RuntimeError:  # the loop has ended
            print(line.text, file=sys.stderr)


def main() -> None:
    """Run the engine's process."""
    die_with_parent()
    # Who ends a server may send signals to all its processes; the server says when the engine may
    # stop. A handler, unlike SIG_IGN, is not inherited by what the engine starts.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    asyncio.run(Host().run(connection))


if __name__ == "__main__":
    main()
