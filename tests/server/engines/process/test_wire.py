"""Messages between server and engine arrive whole and in order, however they are cut up."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyrex.adapters.files.task import TaskVersion
from polyrex.server.engines.base import GenerationRequest, SamplingParams, Token, TokenChunk
from polyrex.server.engines.process.failures import RESTARTING, pack_failure, unpack_failure
from polyrex.server.engines.process.wire import (
    Abort,
    Failed,
    Generate,
    Message,
    ToHost,
    Wire,
    pack_chunk,
    unpack_chunk,
)
from polyrex.server.errors import (
    EngineError,
    EngineOutOfMemory,
    EngineRestarting,
    EngineStopped,
    ServerError,
)
from support.engine_calls import MakeTask


class Pipe(asyncio.Transport):
    """Collects what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return False


def sent(messages: list[Message]) -> bytes:
    wire: Wire[Any] = Wire(ToHost, lambda _: None, lambda: None)
    pipe = Pipe()
    wire.connection_made(pipe)
    for message in messages:
        wire.send(message)
    return bytes(pipe.written)


def received(pieces: list[bytes]) -> list[Message]:
    messages: list[Message] = []
    wire: Wire[Any] = Wire(ToHost, messages.append, lambda: None)
    for piece in pieces:
        wire.data_received(piece)
    return messages


def request(**fields: Any) -> GenerationRequest:
    sampling = SamplingParams(3, 0.7, 0.9, seed=2**63, logprobs=2, prompt_logprobs=1)
    given: dict[str, Any] = {"id": "é😀", "prompt": (1, 2, 49151), "sampling": sampling}
    return GenerationRequest(**given | fields)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=20), st.integers(1, 5))
def test_messages_arrive_however_they_are_cut(cuts: list[int], count: int) -> None:
    messages: list[Message] = [Abort(3)]
    messages += [Generate.of(number, request(cache_salt="s")) for number in range(count)]
    whole, pieces = sent(messages), []
    for cut in cuts:
        pieces.append(whole[:cut])
        whole = whole[cut:]
    assert received([*pieces, whole]) == messages


def test_a_request_arrives_as_it_was(make_task: MakeTask) -> None:
    task = make_task(3)
    (message,) = received([sent([Generate.of(7, request(task=task, cache_salt="Ж"))])])
    assert isinstance(message, Generate)
    arrived = message.unpack()
    assert (message.number, arrived.prompt, arrived.id) == (7, (1, 2, 49151), "é😀")
    assert (arrived.sampling, arrived.cache_salt) == (request().sampling, "Ж")
    assert isinstance(arrived.task, TaskVersion)
    assert arrived.task.info.router_sha256 == task.info.router_sha256
    assert torch.equal(arrived.task.router.weights, task.router.weights)
    assert torch.equal(arrived.task.router.logits, task.router.logits)


def test_a_megabyte_of_token_ids_arrives() -> None:
    ids = tuple(range(350_000))
    (message,) = received([sent([Generate.of(1, request(prompt=ids))])])
    assert isinstance(message, Generate)
    assert message.prompt == ids


@pytest.mark.parametrize(
    "chunk",
    [
        TokenChunk((), "length"),
        TokenChunk((Token(5),), None, cached=16),
        TokenChunk((Token(5, -math.inf, ((5, -0.1), (6, -math.inf))),), "stop"),
        TokenChunk((), None, (Token(1), Token(2, -0.123456789012345))),
    ],
)
def test_a_chunk_arrives_as_it_was(chunk: TokenChunk) -> None:
    assert unpack_chunk(pack_chunk(chunk)) == chunk


@pytest.mark.parametrize(
    ("error", "arrives"),
    [
        (EngineError("no"), EngineError("no")),
        (EngineOutOfMemory("too large"), EngineOutOfMemory("too large")),
        (EngineStopped("down"), EngineRestarting(RESTARTING)),
        (RuntimeError("/secret/path"), EngineError("the engine failed on this request")),
    ],
)
def test_a_failure_keeps_its_kind_and_tells_no_secrets(
    error: Exception, arrives: ServerError
) -> None:
    packed = msgspec.msgpack.encode(pack_failure(3, "id", error))
    found = unpack_failure(msgspec.msgpack.decode(packed, type=Failed))
    assert (type(found), str(found)) == (type(arrives), str(arrives))
