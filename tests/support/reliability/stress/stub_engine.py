"""An engine without a model: deterministic tokens, a step that takes a set time, and switches.

It batches as a real one does: a step gives every running request one token, and takes as long
whatever the number. A request whose prompt begins with one of `SWITCHES` makes it crash, hang or
slow down, as a real engine would on a fault that one request brings along.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from importlib import import_module
from typing import Any

from polyrex.server.engines.base import EngineStats, GenerationRequest, Token, TokenChunk
from polyrex.server.errors import EngineStopped

CRASH, HANG, SLOW = 499, 498, 497
"""The first tokens of prompts that end the process, stop all steps, or make them take longer."""

SWITCHES = (CRASH, HANG, SLOW)
CRASHED = 70
"""The exit status of a process that a prompt made crash."""
SLOWER = 10
"""How many times as long a step takes while a slow prompt runs."""


@dataclass(frozen=True)
class StubSettings:
    """How fast the engine is: `most_running` tokens in `step_seconds`, at most."""

    step_seconds: float = 0.02
    most_running: int = 8
    context_length: int = 512
    vocabulary: int = 500


STUB = f"{__name__}:build"
"""The name of `build`, as EngineClient is given it."""


def build(settings: Mapping[str, Any]) -> StubEngine:
    """The engine, in its process; the settings are the fields of StubSettings."""
    import_module(
        "polyrex.adapters.files.task"
    )  # or the first task would, and stop all for seconds
    return StubEngine(StubSettings(**settings))


def expected_text(prompt: tuple[int, ...], router_sha256: str, tokens: int) -> str:
    """What the small tokenizer makes of the engine's answer: hexadecimal digits."""
    digits = sha256(f"{prompt} {router_sha256}".encode()).hexdigest()
    return (digits * (1 + tokens // len(digits)))[:tokens]


@dataclass(eq=False)
class _Running:
    request: GenerationRequest
    digits: str
    chunks: asyncio.Queue[TokenChunk | Exception] = field(default_factory=asyncio.Queue)
    given: int = 0

    def advance(self) -> bool:
        """Give it its next token; whether that was the last one."""
        sampling = self.request.sampling
        prompt = _scored_prompt(self.request) if self.given == 0 else None
        if sampling.max_tokens == 0:
            self.chunks.put_nowait(TokenChunk((), "length", prompt))
            return True
        token = _token(int(self.digits[self.given % len(self.digits)], 16), sampling.logprobs)
        self.given += 1
        over = self.given == sampling.max_tokens
        self.chunks.put_nowait(TokenChunk((token,), "length" if over else None, prompt))
        return over


class StubEngine:
    """Implements `polyrex.server.engines.base.Engine`."""

    def __init__(self, settings: StubSettings = StubSettings()) -> None:
        self._settings = settings
        self._waiting: deque[_Running] = deque()
        self._running: list[_Running] = []
        self._work = asyncio.Event()
        self._stepping: asyncio.Task[None] | None = None
        self._steps = self._generated = self._prompts = 0

    @property
    def context_length(self) -> int:
        """Tokens of a prompt and its completion."""
        return self._settings.context_length

    @property
    def most_running(self) -> int:
        """Completions that get a token in one step."""
        return self._settings.most_running

    @property
    def vocabulary(self) -> int:
        """The number of token ids."""
        return self._settings.vocabulary

    async def start(self) -> None:
        """Begin to step."""
        self._stepping = asyncio.create_task(self._step_for_ever())

    async def stop(self) -> None:
        """End every request."""
        if self._stepping is not None:
            self._stepping.cancel()
            await asyncio.gather(self._stepping, return_exceptions=True)
        self._stepping = None
        for one in (*self._running, *self._waiting):
            one.chunks.put_nowait(EngineStopped("the engine is shutting down"))
        self._running.clear()
        self._waiting.clear()

    def check(self) -> None:
        """Raise EngineStopped where it does not run."""
        if self._stepping is None or self._stepping.done():
            raise EngineStopped("the engine is not running")

    def stats(self) -> EngineStats:
        """What was counted."""
        tasks = {one.request.task.router.sha256 for one in self._running if one.request.task}
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            kv_cache_usage=len(self._running) / self._settings.most_running,
            slots_used=len(tasks),
            steps=self._steps,
            prompt_tokens=self._prompts,
            generated_tokens=self._generated,
            kv_block_size=16,
            kv_blocks=self._settings.most_running * self._settings.context_length // 16,
        )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """One token a step."""
        self.check()
        request.check(self._settings.vocabulary, self._settings.context_length)
        router = "" if request.task is None else request.task.router.sha256
        one = _Running(request, expected_text(request.prompt, router, 64))
        self._waiting.append(one)
        self._work.set()
        try:
            while True:
                outcome = await one.chunks.get()
                if isinstance(outcome, Exception):
                    raise outcome
                yield outcome
                if outcome.finish_reason is not None:
                    return
        finally:
            self._forget(one)

    def _forget(self, one: _Running) -> None:
        if one in self._running:
            self._running.remove(one)
        elif one in self._waiting:
            self._waiting.remove(one)

    async def _step_for_ever(self) -> None:
        clock = asyncio.get_running_loop().time
        due = clock()
        while True:
            if not (self._running or self._waiting):
                self._work.clear()
                await self._work.wait()
                due = clock()
            self._admit()
            slow = any(one.request.prompt[0] == SLOW for one in self._running)
            due = max(due, clock()) if slow else max(due, clock() - self._settings.step_seconds)
            due += self._settings.step_seconds * (SLOWER if slow else 1)
            await asyncio.sleep(max(0, due - clock()))
            self._step()

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._settings.most_running:
            self._running.append(self._waiting.popleft())

    def _step(self) -> None:
        first = {one.request.prompt[0] for one in self._running}
        if CRASH in first:
            os._exit(CRASHED)
        if HANG in first:
            return  # the clock goes on, and nobody gets anything any more
        self._steps += 1
        for one in list(self._running):
            self._prompts += 0 if one.given else len(one.request.prompt)
            self._generated += 1
            if one.advance():
                self._running.remove(one)


def _scored_prompt(request: GenerationRequest) -> tuple[Token, ...] | None:
    wanted = request.sampling.prompt_logprobs
    if wanted is None:
        return None
    first, *rest = request.prompt
    return (Token(first), *(_token(token, wanted) for token in rest))


def _token(number: int, logprobs: int | None) -> Token:
    if logprobs is None:
        return Token(number)
    return Token(number, -0.5, tuple((number + i, -0.5 - i) for i in range(logprobs)))
