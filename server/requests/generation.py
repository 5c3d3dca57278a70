"""Runs a request's choices in the engine, all at once, and turns their tokens into text."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol, TypeVar

from polyrex.server.engines.base import FinishReason, GenerationRequest, Token, TokenChunk
from polyrex.server.errors import EngineError
from polyrex.server.observability.metrics import Metrics
from polyrex.server.observability.requests import Value, current_request

from .prepare import Choice, PreparedRequest
from .text import IncrementalDecoder, StopScanner, Tokenizer

T = TypeVar("T")


@dataclass(frozen=True)
class TextToken:
    """A token as text, with its log-probability and its best alternatives, each with its own."""

    text: str
    logprob: float | None  # None for a prompt's first token
    top: tuple[tuple[str, float], ...]
    offset: int  # in characters of the choice's text, echo included


@dataclass(frozen=True)
class Piece:
    """Text that has become certain, and the tokens that begin in it, where they were asked for."""

    text: str
    tokens: tuple[TextToken, ...] = ()
    finish_reason: FinishReason | None = None
    generated: int = 0  # tokens that the engine generated for this piece
    cached: int = 0  # tokens of the prompt that were in the engine's prefix cache


class Generates(Protocol):
    """An engine, or a place in one."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """As `Engine.generate`."""
        ...


async def generate(
    engine: Generates, tokenizer: Tokenizer, metrics: Metrics, prepared: PreparedRequest
) -> AsyncGenerator[tuple[int, Piece], None]:
    """Yield the pieces of all choices as they come, each with the index of its choice.

    Closing the generator aborts the choices that are still running.
    """
    watch = _Watch(metrics, prepared)
    streams = [_complete(engine, tokenizer, choice) for choice in prepared.choices]
    failure: Exception | None = None
    try:
        async with aclosing(_merge(streams)) as pieces:
            async for index, piece in pieces:
                watch.piece(index, piece)
                yield index, piece
    except Exception as error:
        failure = error
        raise
    finally:
        watch.end(failure)


async def collect(
    pieces: AsyncGenerator[tuple[int, Piece], None], choices: int
) -> list[list[Piece]]:
    """Await all pieces, sorted by choice."""
    collected: list[list[Piece]] = [[] for _ in range(choices)]
    async with aclosing(pieces):
        async for index, piece in pieces:
            collected[index].append(piece)
    return collected


async def _complete(
    engine: Generates, tokenizer: Tokenizer, choice: Choice
) -> AsyncGenerator[Piece, None]:
    assembler = _Assembler(tokenizer, choice)
    async with aclosing(engine.generate(choice.request)) as chunks:
        async for chunk in chunks:
            piece = assembler.push(chunk)
            yield piece
            if piece.finish_reason is not None:
                return
    raise EngineError(f"the engine ended {choice.request.id} without a finish reason")


async def _merge(
    streams: Sequence[AsyncGenerator[T, None]],
) -> AsyncGenerator[tuple[int, T], None]:
    """Yield the items of all streams as they come, each with the index of its stream."""
    if len(streams) == 1:  # most often; it needs no task beside that of the request
        async with aclosing(streams[0]) as alone:
            async for item in alone:
                yield 0, item
        return
    # Bounded, so that a slow reader holds the streams back.
    queue: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(len(streams))

    async def drain(index: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await queue.put((index, item))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(drain(index, stream)) for index, stream in enumerate(streams)]
    try:
        ended = 0
        while ended < len(streams):
            found = await queue.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                ended += 1
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Watch:
    """Tells metrics, logs and the trace of a request how its choices get on."""

    def __init__(self, metrics: Metrics, prepared: PreparedRequest) -> None:
        self._request = request = current_request()
        self._times = [
            metrics.completion(request.received, len(choice.request.prompt))
            for choice in prepared.choices
        ]
        request.task = None if prepared.task is None else prepared.task.info
        request.prompt_tokens = prepared.prompt_tokens
        if request.trace is not None:
            request.trace.begin_engine(_asked(prepared))

    def piece(self, index: int, piece: Piece) -> None:
        if piece.generated:
            self._times[index].tokens(piece.generated)
            self._request.generated_tokens += piece.generated
        if piece.finish_reason is not None:
            self._ended(index, piece.finish_reason)

    def end(self, failure: Exception | None) -> None:
        for index in range(len(self._times)):
            self._ended(index, "abort" if failure is None else "error")
        request = self._request
        if request.trace is not None:
            used = {
                "gen_ai.usage.input_tokens": request.prompt_tokens,
                "gen_ai.usage.output_tokens": request.generated_tokens,
            }
            request.trace.end_engine(used, None if failure is None else type(failure).__name__)

    def _ended(self, index: int, reason: str) -> None:
        times = self._times[index]
        if times.end(reason) and self._request.trace is not None:
            about: dict[str, Value] = {"index": index, "finish_reason": reason, **times.about()}
            self._request.trace.completion_ended(about)


def _asked(prepared: PreparedRequest) -> dict[str, Value]:
    """What a trace says of a request, in OpenTelemetry's terms for generative models."""
    sampling = prepared.choices[0].request.sampling
    chat = prepared.id.startswith("chatcmpl")
    return {
        "gen_ai.operation.name": "chat" if chat else "text_completion",
        "gen_ai.request.model": prepared.model,
        "gen_ai.request.choice.count": len(prepared.choices),
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.response.id": prepared.id,
    }


class _Assembler:
    """Turns the token chunks of one choice into pieces of text."""

    def __init__(self, tokenizer: Tokenizer, choice: Choice) -> None:
        self._tokenizer = tokenizer
        self._choice = choice
        self._decoder = IncrementalDecoder(tokenizer, choice.request.prompt)
        self._stops = StopScanner(choice.stop)
        self._echo = choice.echo  # None once it has been shown
        self._decoded = self._shown = len(choice.echo or "")  # characters
        self._waiting: deque[TextToken] = deque()

    def push(self, chunk: TokenChunk) -> Piece:
        text, self._echo = self._echo or "", None
        echoed = self._prompt_tokens(chunk.prompt or ())
        shown = self._extend(chunk)
        finish = "stop" if self._stops.stopped else chunk.finish_reason
        if finish is not None:
            shown += self._stops.flush()
        self._shown += len(shown)
        tokens = self._release(everything=finish is not None and not self._stops.stopped)
        return Piece(text + shown, echoed + tokens, finish, len(chunk.tokens), chunk.cached)

    def _extend(self, chunk: TokenChunk) -> str:
        shown = ""
        for token in chunk.tokens:
            if self._choice.request.sampling.logprobs is not None:
                self._waiting.append(self._text_token(token, self._decoded))
            new = self._decoder.push(token.id)
            self._decoded += len(new)
            shown += self._stops.push(new)
            if self._stops.stopped:
                break
        return shown

    def _release(self, *, everything: bool) -> tuple[TextToken, ...]:
        """Remove and return the waiting tokens that begin in the text shown so far."""
        released = []
        while self._waiting and (everything or self._waiting[0].offset < self._shown):
            released.append(self._waiting.popleft())
        return tuple(released)

    def _prompt_tokens(self, tokens: Sequence[Token]) -> tuple[TextToken, ...]:
        decoder = IncrementalDecoder(self._tokenizer)
        offset = 0
        found = []
        for token in tokens:
            found.append(self._text_token(token, offset))
            offset += len(decoder.push(token.id))
        return tuple(found)

    def _text_token(self, token: Token, offset: int) -> TextToken:
        def decode(token_id: int) -> str:
            return self._tokenizer.decode([token_id], special=True)

        top = tuple((decode(token_id), logprob) for token_id, logprob in token.top)
        return TextToken(decode(token.id), token.logprob, top, offset)
