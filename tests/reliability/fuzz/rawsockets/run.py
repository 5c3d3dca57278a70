"""Mutated HTTP requests over raw sockets: none of them is a 5xx, hangs, or changes anything."""

from __future__ import annotations

import asyncio
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

import h11

from reliability.fuzz.rawsockets.mutations import Requests, case
from reliability.fuzz.served import Served
from reliability.result import Result
from support.reliability.client import LOST
from support.tenants.identities import OPERATOR_KEY

PATIENCE = 5.0
"""Seconds within which the server must answer, or close the connection."""
_SILENCE = 0.1
"""Seconds without a byte, after which the client says that it sends no more."""
_READ = 1 << 16
_AT_ONCE = 16
_ENOUGH = 100
"""So many cases that went wrong say all there is to say."""

INTERNAL = re.compile(rb"0x[0-9a-f]{6,}|/usr/|Traceback|site-packages|polyrex/server")
"""What no answer may tell of the server's inside."""


@dataclass(frozen=True)
class Seen:
    """What a connection showed; `ended`: it was answered and closed in time."""

    answer: bytes
    ended: bool


@dataclass
class Tally:
    """What went wrong, by kind, and what was answered, by status."""

    connections: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    numbers: list[tuple[int, str]] = field(default_factory=list)

    def add(self, number: int, sent: bytes, seen: Seen, keys: Sequence[str]) -> None:
        """Count one connection."""
        self.connections += 1
        statuses, whole = answers(seen.answer, sent)
        self.statuses.update(statuses)
        for kind in faults(sent, seen, statuses, keys, whole=whole):
            self.wrong[kind] += 1
            self.numbers.append((number, kind))


KINDS = ("5xx", "hangs", "let in without a key", "no HTTP", "internals told")


def faults(
    sent: bytes, seen: Seen, statuses: Sequence[int], keys: Sequence[str], *, whole: bool
) -> Iterator[str]:
    """What is wrong with an answer, in words of KINDS."""
    if any(status >= 500 for status in statuses):
        yield "5xx"
    if not seen.ended:
        yield "hangs"
    has_key = any(key.encode() in sent for key in keys)
    if not has_key and b"livez" not in sent and any(status < 300 for status in statuses):
        yield "let in without a key"
    if not whole and seen.ended:
        yield "no HTTP"
    if INTERNAL.search(seen.answer):
        yield "internals told"


class _Received:
    """What http.client wants of a socket."""

    def __init__(self, file: io.BytesIO) -> None:
        self._file = file

    def makefile(self, _mode: str) -> io.BytesIO:
        return self._file


class _Kept(io.BytesIO):
    """Bytes that a response does not close behind itself: another may follow."""

    def close(self) -> None:
        """Nothing."""


def answers(received: bytes, sent: bytes) -> tuple[list[int], bool]:
    """The statuses of the answers, and whether all that was received are answers of HTTP.

    The last one may have been broken off by the client itself.
    """
    file, statuses = _Kept(received), list[int]()
    while file.tell() < len(received):
        response = HTTPResponse(_Received(file), method="GET")  # type: ignore[arg-type]
        try:
            response.begin()
            statuses.append(response.status)
            if b"HEAD " in sent or b"CONNECT " in sent:
                return statuses, True  # which of the answers have no body is hard to tell
            response.read()
        except (HTTPException, ValueError):
            return statuses, bool(statuses) or received == b"HTTP/1.1 100 Continue\r\n\r\n"
    return statuses, True


def is_whole(sent: bytes) -> bool:
    """Whether the first request has arrived, so that an answer is due."""
    reader = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    reader.receive_data(sent)
    try:
        while True:
            event = reader.next_event()
            if isinstance(event, h11.EndOfMessage):
                return True
            if event in (h11.NEED_DATA, h11.PAUSED) or isinstance(event, h11.ConnectionClosed):
                return False
    except h11.RemoteProtocolError:
        return False


async def exchange(port: int, pieces: Sequence[bytes], patience: float = PATIENCE) -> Seen:
    """Send the pieces, and read until the server closes the connection.

    Where an answer is due, the client waits for it; then, and where none is, it says after a short
    silence that it sends no more, upon which the server has to close.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = bytearray()
    try:
        async with asyncio.timeout(patience):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            while is_whole(b"".join(pieces)) and not _is_begun(answer):
                got = await reader.read(_READ)
                if not got:
                    break
                answer += got
        await _until_silent(reader, answer)
        if not reader.at_eof():
            writer.write_eof()
        async with asyncio.timeout(patience):
            while got := await reader.read(_READ):
                answer += got
    except TimeoutError:
        return Seen(bytes(answer), ended=False)
    except OSError:
        pass  # the server has closed it with bytes unread
    finally:
        writer.transport.abort()
    return Seen(bytes(answer), ended=True)


def _is_begun(answer: bytearray) -> bool:
    """Whether an answer has begun to arrive, besides the leave to send on."""
    return answer.count(b"HTTP/1.1 ") > answer.count(b"HTTP/1.1 100 ")


async def _until_silent(reader: asyncio.StreamReader, answer: bytearray) -> None:
    with suppress(TimeoutError):
        while True:
            async with asyncio.timeout(_SILENCE):
                got = await reader.read(_READ)
            if not got:
                return
            answer += got


async def _all(
    port: int, requests: Requests, keys: Sequence[str], numbers: Iterator[int], seed: int
) -> Tally:
    tally = Tally()

    async def work() -> None:
        for number in numbers:
            pieces = case(requests, seed, number)
            tally.add(number, b"".join(pieces), await exchange(port, pieces), keys)
            if sum(tally.wrong.values()) >= _ENOUGH:
                return

    await asyncio.gather(*(work() for _ in range(_AT_ONCE)))
    return tally


def sockets(served: Served, found: Path, *, count: int, seed: int = 0) -> Result:
    """Send so many mutated requests; each that goes wrong is made short, and written to `found`."""
    keys = [OPERATOR_KEY, served.inference_key]
    requests = Requests.of([*keys, None])
    before = served.canary(), served.processes(), served.tasks()
    tally = asyncio.run(_all(served.port, requests, keys, iter(range(count)), seed))
    after = _state(served)
    for number, kind in tally.numbers[:3]:
        data = minimised(served.port, b"".join(case(requests, seed, number)), kind, keys)
        (found / f"{kind.replace(' ', '-')}-{seed}-{number}.bin").write_bytes(data)
    return Result(
        goal="mutated HTTP over raw sockets: no 5xx, no hang, nothing changed",
        length=f"{tally.connections} connections, seed {seed}",
        figures={
            "connections": tally.connections,
            "statuses": len(tally.statuses),
            **{kind: tally.wrong[kind] for kind in KINDS},
            "canaries that differ": float(before[0] != after[0]),
            "processes that ended": float(before[1] != after[1]),
            "tasks that came or went": float(before[2] != after[2]),
        },
        at_most=dict.fromkeys(
            (*KINDS, "canaries that differ", "processes that ended", "tasks that came or went"), 0
        ),
        at_least={"connections": count, "statuses": 8},
        remarks=[
            f"{kind}: request {number} of seed {seed}, in {found}" for number, kind in tally.numbers
        ],
    )


def _state(served: Served) -> tuple[Any, Any, Any]:
    """The canary, the processes, and the tasks; None for what cannot be asked any more."""
    try:
        return served.canary(), served.processes(), served.tasks()
    except LOST:
        return None, None, None


def minimised(port: int, data: bytes, kind: str, keys: Sequence[str]) -> bytes:
    """A short request that goes wrong in the same way: parts are left out while it does."""

    def still(wanted: bytes) -> bool:
        seen = asyncio.run(exchange(port, [wanted], patience=2.0))
        statuses, whole = answers(seen.answer, wanted)
        return kind in faults(wanted, seen, statuses, keys, whole=whole)

    size = len(data) // 2
    tries = 200
    while size and tries > 0:
        at = 0
        while at < len(data) and tries > 0:
            tries -= 1
            shorter = data[:at] + data[at + size :]
            if still(shorter):
                data = shorter
            else:
                at += size
        size //= 2
    return data
