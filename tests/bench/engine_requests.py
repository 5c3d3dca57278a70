"""Requests of token ids, sent to an engine in this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterable
from contextlib import aclosing
from typing import NamedTuple

from polyrex.adapters.files.task import TaskVersion
from polyrex.server.engines.base import Engine, GenerationRequest, SamplingParams


async def answer(
    engine: Engine, prompt: tuple[int, ...], new: int, task: TaskVersion | None
) -> int:
    """Generate `new` tokens greedily; returns their number."""
    sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    request = GenerationRequest("bench", prompt, sampling, task)
    async with aclosing(engine.generate(request)) as chunks:
        return sum([len(chunk.tokens) async for chunk in chunks])


class Answered(NamedTuple):
    """The tokens of an answer, and the seconds to the first of them."""

    tokens: list[int]
    seconds: float


async def first_token(
    engine: Engine, prompt: tuple[int, ...], new: int, task: TaskVersion | None, salt: str = ""
) -> Answered:
    """Generate `new` tokens greedily, and time the first."""
    sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    request = GenerationRequest("bench", prompt, sampling, task, salt)
    tokens, seconds = [], None
    started = time.perf_counter()
    async with aclosing(engine.generate(request)) as chunks:
        async for chunk in chunks:
            seconds = seconds or time.perf_counter() - started
            tokens += [token.id for token in chunk.tokens]
    assert seconds is not None
    return Answered(tokens, seconds)


async def tokens_per_second(answers: Iterable[Awaitable[int]], new: int) -> float:
    """The rate of new tokens when these answers, of `new` tokens each, are awaited at once."""
    started = time.perf_counter()
    counts = await asyncio.gather(*answers)
    seconds = time.perf_counter() - started
    assert set(counts) == {new}
    return sum(counts) / seconds
