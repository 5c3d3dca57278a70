"""What the HTTP side costs: plain completions a second on one core, and a chunk of 200 streams.

    make bench-http

The engine costs nothing. The server has one core for itself, and its clients, which are raw
sockets, another. Contenders, the parsers of HTTP, take turns. Figures are by wall time, and by the
time that the server's process had its core, which other processes change less. At last profiles of
the first contender tell where its time goes, itself and in what it calls.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from bench.harness import Turns, command_line, machine, report
from bench.http.stub_server import STREAMS, Order

CONTENDERS: dict[str, dict[str, str]] = {
    "ours": {},
    "uvicorn's httptools": {"parser": "httptools"},
    "uvicorn's h11": {"parser": "h11"},
}
CONNECTIONS = 16
COMPLETIONS = 4000
"""Plain completions of one turn."""
TOKENS = 25
"""Chunks of each stream."""


class Figures(NamedTuple):
    """How long events took: of wall time, and of the server's processor."""

    wall: float  # events a second
    processor: float  # seconds an event


@contextmanager
def stub_server(**order: Any) -> Iterator[tuple[int, psutil.Process]]:
    """The port and the process of a server; the context ends it."""
    with tempfile.TemporaryDirectory(prefix="polyrex-http-") as folder:
        told = replace(Order(folder, core=min(os.sched_getaffinity(0))), **order).to_json()
        command = [sys.executable, "-m", "bench.http.stub_server", told]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as popen:
            try:
                assert popen.stdout is not None
                port = int(popen.stdout.readline())
                asyncio.run(_until_ready(port))
                yield port, psutil.Process(popen.pid)
            finally:
                popen.terminate()


def request(**body: Any) -> bytes:
    """A completion as it is sent."""
    content = json.dumps({"model": "base", "prompt": "1 2 3", "temperature": 0, **body}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"accept: */*\r\nuser-agent: bench\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def _until_ready(port: int) -> None:
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /readyz HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
        ready = (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()
        if ready:
            return
        await asyncio.sleep(0.1)


async def plain(port: int, count: int) -> int:
    """Send so many plain completions on a few connections; how many were answered."""
    sent = request(max_tokens=16)
    left = count

    async def client() -> None:
        nonlocal left
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while left > 0:
            left -= 1
            writer.write(sent)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(head.decode())
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            await reader.readexactly(int(length))
        writer.close()

    await asyncio.gather(*(client() for _ in range(CONNECTIONS)))
    return count


async def streams(port: int, count: int) -> int:
    """Read so many streams at the same time; how many chunks came."""
    sent = request(max_tokens=TOKENS, stream=True)

    async def client() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        received = await reader.readuntil(b"data: [DONE]\n\n")
        writer.close()
        return received.count(b"data: ") - 1

    chunks = sum(await asyncio.gather(*(client() for _ in range(count))))
    if chunks < count * TOKENS:
        raise RuntimeError(f"{chunks} chunks of {count} streams")
    return chunks


def timed(
    work: Callable[[int, int], Awaitable[int]], server: tuple[int, psutil.Process], count: int
) -> Figures:
    """Do this work with a server."""
    port, process = server

    async def run() -> int:
        return await work(port, count)

    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    before, started = sum(process.cpu_times()[:2]), time.perf_counter()
    events = asyncio.run(run())
    seconds = time.perf_counter() - started
    os.sched_setaffinity(0, cores)
    return Figures(events / seconds, (sum(process.cpu_times()[:2]) - before) / events)


def measure(rounds: int) -> dict[str, Any]:
    """All contenders in turns: their medians, and how they compare with uvicorn's h11."""
    figures = {"completions_per_second": Turns(), "completion_ms": Turns(), "chunk_ms": Turns()}
    with ExitStack() as running:
        servers = {
            name: running.enter_context(stub_server(**order)) for name, order in CONTENDERS.items()
        }
        for turn in range(rounds + 1):  # the first one warms up
            for name, server in servers.items():
                done = timed(plain, server, COMPLETIONS)
                chunk = timed(streams, server, STREAMS)
                if turn:
                    figures["completions_per_second"].add(name, done.wall)
                    figures["completion_ms"].add(name, done.processor * 1e3)
                    figures["chunk_ms"].add(name, chunk.processor * 1e3)
    return {
        "contenders": {measure: turns.medians(3) for measure, turns in figures.items()},
        "to_h11": {
            name: {
                measure: turns.compare(name, "uvicorn's h11").ratio
                for measure, turns in figures.items()
            }
            for name in CONTENDERS
            if name != "uvicorn's h11"
        },
    }


def profiled(work: Callable[[int, int], Awaitable[int]], count: int) -> dict[str, float]:
    """The share of the server's time that each package, or file of ours, takes itself."""
    with tempfile.TemporaryDirectory(prefix="polyrex-profile-") as folder:
        written = Path(folder) / "shares.json"
        with stub_server(profile=str(written)) as server:
            timed(work, server, count)
        shares: dict[str, float] = json.loads(written.read_text())
    return shares


def main() -> None:
    """The command."""
    options = command_line(__doc__, rounds=3).parse_args()
    document = {
        "machine": machine(),
        "connections": CONNECTIONS,
        "streams": STREAMS,
        **measure(options.rounds),
        "profile": {
            "plain completions": profiled(plain, COMPLETIONS),
            f"{STREAMS} streams": profiled(streams, STREAMS),
        },
    }
    report(document, options.out)


if __name__ == "__main__":
    main()
