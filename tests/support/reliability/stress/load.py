"""A process that sends requests at set times, whatever becomes of them, and says when what came.

    python load.py < plan.json > found.json

An open loop: a request is sent when it is due, not when an earlier one was answered. All times are
measured from when it was due, so a load that is late itself makes the server look slower, never
faster; how late it was is told as well. It imports nothing but the standard library, so that it
starts at once and takes little of the machine.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import resource
import socket
import sys
import time
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
_TICK_SECONDS = 0.01
_DRIP_SECONDS = 1.0
_SMALL_BUFFER = 2048  # bytes

Flow = Mapping[str, Any]
"""Requests of one kind: a name, `kind`, and what that kind needs."""


def due_times(flow: Flow, seconds: float) -> list[float]:
    """When requests are due, in seconds from the start: at random, but the same in every run."""
    chosen = random.Random(flow["name"])
    times, at = [], float(flow.get("after", 0))
    end = min(seconds, flow.get("until", seconds))
    while (at := at + chosen.expovariate(flow["rate"])) < end:
        times.append(at)
    return times


def request_bytes(flow: Flow) -> bytes:
    """A whole request, after which the server closes the connection."""
    body = Path(flow["file"]).read_bytes() if "file" in flow else flow.get("body", "").encode()
    method = "POST" if body else "GET"
    lines = [f"{method} {flow['path']} HTTP/1.1", f"Host: {HOST}", "Connection: close"]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    if "key" in flow:
        lines.append(f"Authorization: Bearer {flow['key']}")
    return "\r\n".join([*lines, "", ""]).encode() + body


@dataclass
class Load:
    """The requests of one plan, and what became of them."""

    port: int
    seconds: float
    found: dict[str, list[list[Any]]] = field(default_factory=dict)
    lags: list[float] = field(default_factory=list)
    started: float = 0.0

    async def run(self, flows: list[Flow], grace: float) -> None:
        """Send all of it; what has no answer `grace` seconds after the end has none."""
        self.started = time.monotonic() + 0.1
        work = [asyncio.create_task(self._begin(flow)) for flow in flows]
        ticking = asyncio.create_task(self._tick())
        _, late = await asyncio.wait(work, timeout=self.seconds + 0.1 + grace)
        for task in (*late, ticking):
            task.cancel()
        await asyncio.gather(*work, ticking, return_exceptions=True)

    def _begin(self, flow: Flow) -> Coroutine[Any, Any, None]:
        self.found[flow["name"]] = []
        if flow["kind"] == "drip":
            return self._drip(flow)
        return self._requests(flow)

    async def _requests(self, flow: Flow) -> None:
        request, sources = request_bytes(flow), _sources(flow)
        send = self._stall if flow["kind"] == "stall" else self._exchange
        sent = []
        for at in due_times(flow, self.seconds):
            await asyncio.sleep(max(0, self.started + at - time.monotonic()))
            sent.append(asyncio.create_task(send(flow, request, next(sources), at)))
        await asyncio.gather(*sent)

    async def _exchange(self, flow: Flow, request: bytes, source: str, at: float) -> None:
        """Note when it was due, its status (0 where none came), whether the answer is whole,
        whether it says when to come again, and the seconds to its first event and to its end."""
        loop = asyncio.get_running_loop()
        entry: list[Any] = [at, 0, False, False, None, None]
        self.found[flow["name"]].append(entry)
        answer, due = bytearray(), self.started + at
        with suppress(OSError), await _connect(self.port, source) as connection:
            await loop.sock_sendall(connection, request)
            while piece := await loop.sock_recv(connection, 1 << 16):
                answer += piece
                if entry[4] is None and b"data: " in answer:
                    entry[4] = time.monotonic() - due
        head, _, rest = bytes(answer).partition(b"\r\n\r\n")
        status = head[9:12]
        streamed = b"text/event-stream" in head
        whole = b"data: [DONE]" in rest if streamed else bool(rest)
        entry[1:4] = [
            int(status) if status.isdigit() else 0,
            whole,
            b"retry-after:" in head.lower(),
        ]
        entry[5] = time.monotonic() - due

    async def _stall(self, flow: Flow, request: bytes, source: str, at: float) -> None:
        """Ask, and never read the answer."""
        with suppress(OSError):
            connection = await _connect(self.port, source, _SMALL_BUFFER)
            with connection:
                await asyncio.get_running_loop().sock_sendall(connection, request)
                self.found[flow["name"]].append([at])
                await asyncio.sleep(self.started + self.seconds - time.monotonic())

    async def _drip(self, flow: Flow) -> None:
        """Keep so many connections, on each of which a request arrives one byte a second."""
        sources = _sources(flow)
        await asyncio.gather(*(self._one_drip(flow, next(sources)) for _ in range(flow["count"])))

    async def _one_drip(self, flow: Flow, source: str) -> None:
        loop, begun = (
            asyncio.get_running_loop(),
            f"POST {flow['path']} HTTP/1.1\r\nX-Slow: ".encode(),
        )
        await asyncio.sleep(random.random())
        while (left := self.started + self.seconds - time.monotonic()) > 0:
            with suppress(OSError), await _connect(self.port, source) as connection:
                self.found[flow["name"]].append([self.seconds - left])
                await loop.sock_sendall(connection, begun)
                while time.monotonic() < self.started + self.seconds:
                    await asyncio.sleep(_DRIP_SECONDS)
                    await loop.sock_sendall(connection, b"x")
            await asyncio.sleep(_DRIP_SECONDS)

    async def _tick(self) -> None:
        """How late this process itself is."""
        due = time.monotonic()
        while True:
            due = max(due + _TICK_SECONDS, time.monotonic() - _TICK_SECONDS)
            await asyncio.sleep(due - time.monotonic())
            self.lags.append(max(0.0, time.monotonic() - due))


async def _connect(port: int, source: str, buffer: int | None = None) -> socket.socket:
    """A connection from one of the addresses of loopback."""
    made = socket.socket()
    made.setblocking(False)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        if buffer is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        made.bind((source, 0))
        await asyncio.get_running_loop().sock_connect(made, (HOST, port))
    except BaseException:
        made.close()
        raise
    return made


def _sources(flow: Flow) -> Iterator[str]:
    """The addresses that a flow comes from, in turns: `network` is the third number of each."""
    count = flow.get("addresses", 1)
    return itertools.cycle([f"127.0.{flow.get('network', 0)}.{1 + n}" for n in range(count)])


def main() -> None:
    """Read the plan from standard input, and write what was found."""
    plan = json.load(sys.stdin)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    load = Load(plan["port"], plan["seconds"])
    asyncio.run(load.run(plan["flows"], plan["grace"]))
    json.dump({"found": load.found, "lags": load.lags}, sys.stdout)


if __name__ == "__main__":
    main()
