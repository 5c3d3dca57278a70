"""What the server and the engine's process say to each other, and how it travels.

Each message is msgpack behind its length, on a pair of sockets that no other process can open. The
two sides trust each other. Neither waits for the other to read: what can pile up is bounded by the
requests that the server admits, and by their tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import msgspec

from polyrex.server.engines.base import EngineStats, GenerationRequest, SamplingParams, TokenChunk

if TYPE_CHECKING:
    from torch import Tensor

    from polyrex.adapters.files.task import TaskVersion

_LENGTH_BYTES = 4
_CHUNKS = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(TokenChunk)


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A message; its class is its tag."""


class Start(Message, frozen=True):
    """The first message to the engine's process: which engine to build, and from what."""

    build: str  # `module:function`, which makes an engine of the settings
    settings: dict[str, Any]
    log_level: int


class Array(msgspec.Struct, frozen=True, array_like=True):
    """A float32 tensor."""

    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, tensor: Tensor) -> Array:
        """Pack a float32 tensor."""
        return cls(tuple(tensor.shape), tensor.numpy().tobytes())

    def tensor(self) -> Tensor:
        """The tensor, with memory of its own."""
        import torch  # an engine without it starts in no time

        return torch.frombuffer(bytearray(self.data), dtype=torch.float32).reshape(self.shape)


class Task(msgspec.Struct, frozen=True, array_like=True):
    """A task version: kilobytes, so each request brings its own and the engine keeps none."""

    name: str
    version: int
    tenant: str
    sha256: str
    inventory_sha256: str
    logits: Array
    weights: Array

    @classmethod
    def of(cls, task: TaskVersion) -> Task:
        """Pack a task version."""
        info, router = task.info, task.router
        return cls(
            name=info.name,
            version=info.version,
            tenant=info.tenant,
            sha256=info.router_sha256,
            inventory_sha256=router.metadata.inventory_sha256,
            logits=Array.of(router.logits),
            weights=Array.of(router.weights),
        )

    def unpack(self) -> TaskVersion:
        """The task version, without what its registry knows besides."""
        from polyrex.adapters.files.router import Router, RouterMetadata
        from polyrex.adapters.files.task import TaskInfo, TaskVersion

        info = TaskInfo(self.name, self.version, self.sha256, 0, 0.0, tenant=self.tenant)
        metadata = RouterMetadata(self.inventory_sha256, self.name)
        router = Router(self.logits.tensor(), self.weights.tensor(), metadata, self.sha256)
        return TaskVersion(info, router)


class Generate(Message, frozen=True):
    """Begin a request. Its answers carry the number."""

    number: int
    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    task: Task | None
    cache_salt: str

    @classmethod
    def of(cls, number: int, request: GenerationRequest) -> Generate:
        """Pack a request."""
        task = None if request.task is None else Task.of(request.task)
        prompt, sampling, salt = request.prompt, request.sampling, request.cache_salt
        return cls(number, request.id, prompt, sampling, task, salt)

    def unpack(self) -> GenerationRequest:
        """The request."""
        task = None if self.task is None else self.task.unpack()
        return GenerationRequest(self.id, self.prompt, self.sampling, task, self.cache_salt)


class Abort(Message, frozen=True):
    """Nobody waits for this request any more."""

    number: int


class Stop(Message, frozen=True):
    """End every request, and then the process."""


class Ready(Message, frozen=True):
    """The engine is warm."""

    context_length: int


class Tokens(Message, frozen=True):
    """Chunks of many requests, by their numbers, and whether they are the last: all of one step.

    A chunk stays packed until its reader comes for it: a slow one so holds bytes, not objects.
    """

    chunks: list[tuple[int, bool, bytes]]


def pack_chunk(chunk: TokenChunk) -> bytes:
    """The bytes of a chunk."""
    return _CHUNKS[0].encode(chunk)


def unpack_chunk(data: bytes) -> TokenChunk:
    """The chunk of these bytes."""
    return _CHUNKS[1].decode(data)


class Failed(Message, frozen=True):
    """A request failed; others go on."""

    number: int
    kind: str  # failures.py
    message: str


class Pulse(Message, frozen=True):
    """Sent all the time by the loop that also passes on tokens, so it tells that tokens can come.

    `outcomes` counts the chunks and failures so far.
    """

    stats: EngineStats
    outcomes: int


class Log(Message, frozen=True):
    """A line for the server's log."""

    logger: str
    level: int
    text: str


class Down(Message, frozen=True):
    """The engine did not start, or cannot go on: its process ends."""

    reason: str


ToHost = Start | Generate | Abort | Stop
ToServer = Ready | Tokens | Failed | Pulse | Log | Down

M = TypeVar("M", bound=Message)


class Wire(asyncio.Protocol, Generic[M]):
    """One end of the pair of sockets."""

    def __init__(
        self, receives: Any, on_message: Callable[[M], None], on_end: Callable[[], None]
    ) -> None:
        """`receives` is the union of the messages that `on_message` takes.

        `on_end` is called once no message can come any more.
        """
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(receives)
        self._encoder = msgspec.msgpack.Encoder()
        self._on_message = on_message
        self._on_end = on_end
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None

    def send(self, message: Message) -> None:
        """Send a message; nothing happens where the other side has gone."""
        if self._transport is None or self._transport.is_closing():
            return
        frame = bytearray(_LENGTH_BYTES)
        self._encoder.encode_into(message, frame, _LENGTH_BYTES)
        frame[:_LENGTH_BYTES] = (len(frame) - _LENGTH_BYTES).to_bytes(_LENGTH_BYTES, "little")
        self._transport.write(frame)

    def close(self) -> None:
        """Send what is left, and close."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while len(self._received) >= _LENGTH_BYTES:
            end = _LENGTH_BYTES + int.from_bytes(self._received[:_LENGTH_BYTES], "little")
            if len(self._received) < end:
                return
            message = self._decoder.decode(bytes(self._received[_LENGTH_BYTES:end]))
            del self._received[:end]
            self._on_message(message)

    def connection_lost(self, _error: Exception | None) -> None:
        self._on_end()
