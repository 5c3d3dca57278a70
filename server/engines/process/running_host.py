"""One engine's process, as the server sees it: from its start to its end."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from polyrex.server.engines.base import EngineStats, GenerationRequest
from polyrex.server.errors import EngineRestarting, ServerError, StartError

from .environment import host_environment
from .failures import RESTARTING, unpack_failure
from .progress import Progress, any_stopped, processes_of
from .wire import (
    Abort,
    Down,
    Failed,
    Generate,
    Log,
    Pulse,
    Ready,
    Start,
    Stop,
    Tokens,
    ToServer,
    Wire,
)

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-P", "-m", "polyrex.server.engines.process.host")
TURN_SECONDS = 0.2
_STOPPED_TURNS = 2
_STOP_SECONDS = 5.0
"""What an engine may take to stop, before its process is killed."""

Outcome = bytes | ServerError
Answers = asyncio.Queue[Outcome]
"""The packed chunks of one request, or its failure. It never holds more than one for each token."""


@dataclass(frozen=True)
class _Asked:
    """A request under way."""

    ended: Callable[[], None]
    answers: Answers = field(default_factory=asyncio.Queue)


def _nothing() -> None:
    """For requests of which nobody wants to know when they have ended."""


class RunningHost:
    """An engine's process, with the requests that are under way in it.

    `ready` comes once the engine is warm, and fails with StartError where it could not start.
    `ended` is the reason, in words, for which the engine serves no more: every request has been
    told by then, though the process may not be gone yet (`gone`).
    """

    def __init__(self, process: Process, stall_seconds: float, start_turns: float) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[Ready] = loop.create_future()
        self.ended: asyncio.Future[str] = loop.create_future()
        self.stats = EngineStats()
        self.turns = 0  # since the start
        self.ready_at = 0  # the turn
        self._process = process
        self._pids: tuple[int, ...] = (process.pid,)
        self._stall_seconds = stall_seconds
        self._start_turns = start_turns
        self._progress = Progress()
        self._stopped = 0  # turns in a row
        self._numbers = itertools.count()
        self._asked: dict[int, _Asked] = {}
        self._wire: Wire[ToServer] = Wire(ToServer, self._receive, self._hung_up)
        self._watching: asyncio.Task[None] | None = None

    @classmethod
    async def begin(
        cls, start: Start, stall_seconds: float, start_turns: float = math.inf
    ) -> RunningHost:
        """Start a process, and have it build its engine. Raises OSError where there can be none.

        `stall_seconds` is how long it may stand still, `start_turns` how many turns of
        TURN_SECONDS it may take to be ready. It ends with the thread that calls this.
        """
        ours, theirs = socket.socketpair()
        try:
            process = await _spawn(theirs.fileno())
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        host = cls(process, stall_seconds, start_turns)
        await asyncio.get_running_loop().create_unix_connection(lambda: host._wire, sock=ours)
        host._wire.send(start)
        host._watching = asyncio.create_task(host._watch())
        return host

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    @property
    def served_seconds(self) -> float:
        """How long it has been ready, in seconds of this process."""
        return (self.turns - self.ready_at) * TURN_SECONDS if self.ready_at else 0.0

    def ask(self, request: GenerationRequest) -> tuple[int, Answers]:
        """Begin a request; returns its number, and where its outcomes will be."""
        number, asked = next(self._numbers), _Asked(request.ended or _nothing)
        self._wire.send(Generate.of(number, request))  # first: it may refuse what is in it
        self._asked[number] = asked
        return number, asked.answers

    def forget(self, number: int) -> None:
        """Abort a request, if it has not ended."""
        asked = self._asked.pop(number, None)
        if asked is not None:
            self._wire.send(Abort(number))
            asked.ended()

    async def stop(self, error: ServerError) -> None:
        """End every request with `error`, and the process: kindly, if it does so in time."""
        self._end("was told to stop", error)
        self._wire.send(Stop())
        with suppress(TimeoutError):
            async with asyncio.timeout(_STOP_SECONDS):
                await self._process.wait()
        await self.gone()

    async def gone(self) -> None:
        """Kill what is left of the process and of all that it started; return once it is gone."""
        self._wire.abort()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    def _receive(self, message: ToServer) -> None:
        match message:
            case Tokens():
                for number, last, chunk in message.chunks:
                    self._answer(number, chunk, last=last)
            case Failed():
                self._answer(message.number, unpack_failure(message), last=True)
            case Pulse():
                self.stats = message.stats
                self._progress.hear((message.stats.steps, message.outcomes))
            case Log():
                logging.getLogger(message.logger).log(message.level, "%s", message.text)
            case Ready():
                self._become_ready(message)
            case Down():
                self._fail_start(message.reason)
                self._end(f"went down: {message.reason}")

    def _become_ready(self, message: Ready) -> None:
        self.ready_at = self.turns
        self._pids = (self._process.pid, *processes_of(session=self._process.pid))
        if not self.ready.done():
            self.ready.set_result(message)

    def _answer(self, number: int, outcome: Outcome, *, last: bool) -> None:
        asked = self._asked.get(number)
        if asked is None:  # nobody waits any more
            return
        asked.answers.put_nowait(outcome)
        if last:
            del self._asked[number]
            asked.ended()

    def _hung_up(self) -> None:
        # How the process ended says more, if that is why.
        later = asyncio.get_running_loop().call_later
        later(2 * TURN_SECONDS, self._end, "closed its connection")

    async def _watch(self) -> None:
        """Find out that the engine serves no more; its end is told in the same turn."""
        exited = asyncio.ensure_future(self._process.wait())
        while not self.ended.done():
            await asyncio.wait({exited}, timeout=TURN_SECONDS)
            self.turns += 1
            self._progress.turn(busy=bool(self._asked))
            self._stopped = self._stopped + 1 if any_stopped(self._pids) else 0
            reason = _exit_reason(exited.result()) if exited.done() else self._complaint()
            if reason is not None:
                self._end(reason)

    def _complaint(self) -> str | None:
        if self._stopped >= _STOPPED_TURNS:
            return "was stopped by a signal"
        if self._progress.still * TURN_SECONDS >= self._stall_seconds:
            return f"made no progress for {self._stall_seconds:g} s (--engine-stall-seconds)"
        if not self.ready.done() and self.turns >= self._start_turns:
            return f"was not ready after {self.turns * TURN_SECONDS:.0f} s"
        return None

    def _end(self, reason: str, error: ServerError | None = None) -> None:
        if self.ended.done():
            return
        self.ended.set_result(reason)
        self._fail_start(f"its process {reason}")
        ended, self._asked = self._asked, {}
        for asked in ended.values():
            asked.answers.put_nowait(error or EngineRestarting(RESTARTING))
            asked.ended()

    def _fail_start(self, reason: str) -> None:
        if not self.ready.done():
            self.ready.set_exception(StartError(reason))
            self.ready.exception()  # whoever waited for it may have given up


async def _spawn(connection: int) -> Process:
    return await asyncio.create_subprocess_exec(
        *(*COMMAND, str(connection)),
        pass_fds=(connection,),
        stdin=DEVNULL,
        env=host_environment(os.environ),
        # Ctrl-C is the server's to answer; and a group of its own can be killed as a whole.
        start_new_session=True,
    )


def _exit_reason(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    return f"was killed by {signal.Signals(-status).name}"
