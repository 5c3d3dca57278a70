"""What reading JSON bodies costs: the worst ones, the largest legal ones, a small one.

Each body is parsed in several ways, and its values checked by pydantic up to the first error or,
as it was once, up to the last; msgspec does both at once. Then a server on a stub engine gets the
worst bodies, ten a second, and is asked for /livez all the while.

    PYTHONPATH=tests PYTHONSAFEPATH=1 .venv/bin/python -m bench.requests.bodies \
        --out tests/results/bodies.json
"""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import httpx
import msgspec
from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from bench.harness import command_line, machine, report, seconds_of
from polyrex.adapters.errors import PolyrexError
from polyrex.adapters.model.base_model import DEFAULT_BASE, load_tokenizer, resolve_base
from polyrex.adapters.spec import AdapterSpec
from polyrex.server.http.json_body import BodyReader, parse, read
from polyrex.server.requests import bodies
from support.fake_server import FakeEngine, serving
from support.random_inventory import make_inventory
from support.requests.worst_bodies import CHAT, COMPLETION, MEGABYTE, WORST, Body


class EveryError(bodies.CompletionRequest):
    """Collects the errors of all items of a prompt."""

    prompt: bodies.Text | list[Annotated[int, Field(ge=0)]] | list[bodies.Text] | list[list[int]]


class EveryErrorOfMessage(bodies.Message):
    """Collects the errors of all parts."""

    content: bodies.Text | list[bodies.TextPart]


class EveryErrorOfChat(bodies.ChatCompletionRequest):
    """Collects the errors of all messages."""

    messages: list[EveryErrorOfMessage]  # type: ignore[assignment]  # a list of a subclass


class Typed(msgspec.Struct, forbid_unknown_fields=True):
    """A completion as msgspec has it: a list may have one type of items in a union."""

    prompt: str | list[str | int | list[int]]
    temperature: float = 1.0
    stop: str | list[str] = []
    max_tokens: int = 16


class TypedPart(msgspec.Struct, forbid_unknown_fields=True):
    """A part of a message."""

    type: str
    text: str


class TypedMessage(msgspec.Struct, forbid_unknown_fields=True):
    """A message."""

    role: str
    content: str | list[TypedPart]


class TypedChat(msgspec.Struct, forbid_unknown_fields=True):
    """A chat."""

    messages: list[TypedMessage]
    max_tokens: int | None = None


EVERY_ERROR: dict[int, TypeAdapter[Any]] = {
    id(COMPLETION): TypeAdapter(EveryError),
    id(CHAT): TypeAdapter(EveryErrorOfChat),
}
TYPED = {id(COMPLETION): Typed, id(CHAT): TypedChat}


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _words(size: int) -> str:
    return ("some words of a text, " * (size // 22 + 1))[:size]


LEGAL: dict[str, Body] = {
    "a small chat": (
        CHAT,
        _json({"messages": [{"role": "user", "content": _words(100)}], "max_tokens": 16}),
    ),
    "a chat of 16 KB": (CHAT, _json({"messages": [{"role": "user", "content": _words(16_000)}]})),
    "a text of 1 MB": (COMPLETION, _json({"prompt": _words(MEGABYTE - 20)})),
    "a text of 1 MB in escapes": (
        COMPLETION,
        b'{"prompt":"' + b"\\u0041" * ((MEGABYTE - 13) // 6) + b'"}',
    ),
    "token ids of 1 MB": (COMPLETION, _json({"prompt": [7] * ((MEGABYTE - 20) // 2)})),
    "1,024 messages of 1 KB": (
        CHAT,
        _json({"messages": [{"role": "user", "content": _words(980)}] * 1024}),
    ),
}


def ways(kind: TypeAdapter[Any], body: bytes) -> dict[str, Callable[[], object]]:
    """The ways to read a body, by name."""
    value: Any = None
    with suppress(ValueError, RecursionError):
        value = json.loads(body)
    found: dict[str, Callable[[], object]] = {
        "json": lambda: json.loads(body),
        "jiter": lambda: from_json(body),
        "msgspec": lambda: msgspec.json.decode(body),
        "bounded json": lambda: parse(body),
        "check, first error": lambda: kind.validate_python(value),
        "bounded json and check": lambda: read(kind, body),
    }
    if id(kind) in TYPED:
        typed = msgspec.json.Decoder(TYPED[id(kind)])
        every = EVERY_ERROR[id(kind)]
        found["msgspec and check"] = lambda: typed.decode(body)
        found["check, every error"] = lambda: every.validate_python(value)
    return found


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """The median time that a call, whatever it raises, keeps a core busy."""
    taken = []
    for _ in range(repeats):
        began = time.thread_time()
        with suppress(PolyrexError, ValidationError, ValueError, RecursionError):
            call()
        taken.append(time.thread_time() - began)
    return round(1000 * statistics.median(taken), 3)


def stall(kind: TypeAdapter[Any], body: bytes, repeats: int) -> float:
    """Milliseconds: the longest time that an event loop waits while a reader reads a body."""

    async def run() -> float:
        reader, longest = BodyReader(), 0.0

        async def tick() -> None:
            nonlocal longest
            while True:
                began = time.perf_counter()
                await asyncio.sleep(0.001)
                longest = max(longest, time.perf_counter() - began - 0.001)

        ticking = asyncio.create_task(tick())
        for _ in range(repeats):
            with suppress(PolyrexError):
                await reader.read(kind, body)
            await asyncio.sleep(0.01)
        ticking.cancel()
        reader.close()
        return longest

    return round(1000 * asyncio.run(run()), 1)


def _serve(connection: Connection) -> None:
    """Run a server on a stub engine, in a process of its own, until the connection closes."""
    base = resolve_base(DEFAULT_BASE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        spec = AdapterSpec("tensorpoly-1", rank=16, experts=8)
        inventory = make_inventory(path / "inventory.safetensors", base, spec)
        with serving(path / "tasks", inventory, load_tokenizer(base), FakeEngine()) as served:
            connection.send(served.url)
            with suppress(EOFError):
                connection.recv()


@contextmanager
def stub_server() -> Iterator[str]:
    """The address of a server."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,))
    process.start()
    theirs.close()
    try:
        yield ours.recv()
    finally:
        ours.close()
        process.join()


def probe(url: str, seconds: float) -> dict[str, float]:
    """Milliseconds of GET /livez, asked a hundred times a second: p50, p99, the longest."""
    taken = []
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            taken.append(1000 * seconds_of(client.get, "/livez"))
            time.sleep(0.01)
    cuts = statistics.quantiles(taken, n=100)
    figures = {"p50": cuts[49], "p99": cuts[98], "max": max(taken), "asked": len(taken)}
    return {name: round(figure, 2) for name, figure in figures.items()}


def attack(url: str, stopped: threading.Event, statuses: list[int]) -> None:
    """Send the worst bodies in turn, ten a second."""
    paths = {id(CHAT): "/v1/chat/completions", id(COMPLETION): "/v1/completions"}
    sent = itertools.cycle([worst for worst in WORST.values() if id(worst[0]) in paths])
    headers = {"content-type": "application/json"}
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        while not stopped.wait(0.1):
            kind, body = next(sent)
            answer = client.post(paths[id(kind)], content=body, headers=headers)
            statuses.append(answer.status_code)


def under_attack(seconds: float) -> dict[str, Any]:
    """/livez of an idle server, and of one that gets the worst bodies."""
    with stub_server() as url:
        idle = probe(url, seconds)
        stopped, statuses = threading.Event(), list[int]()
        attacking = threading.Thread(target=attack, args=(url, stopped, statuses))
        attacking.start()
        attacked = probe(url, seconds)
        stopped.set()
        attacking.join()
    counts = {str(status): statuses.count(status) for status in sorted(set(statuses))}
    return {"idle_ms": idle, "attacked_ms": attacked, "answers": counts, "seconds": seconds}


def main() -> None:
    """Measure, and report."""
    parser = command_line(__doc__, rounds=5)
    parser.add_argument("--seconds", type=float, default=30, help="of an attack on a server")
    arguments = parser.parse_args()
    read_ms, stall_ms = {}, {}
    for name, (kind, body) in {**WORST, **LEGAL}.items():
        rounds = arguments.rounds * (40 if len(body) < 32_000 else 1)
        read_ms[name] = {
            way: milliseconds(call, 1 if way == "check, every error" else rounds)
            for way, call in ways(kind, body).items()
        }
        stall_ms[name] = stall(kind, body, arguments.rounds)
    document = {
        "machine": machine(),
        "read_ms": read_ms,
        "stall_ms": stall_ms,
        "server": under_attack(arguments.seconds),
    }
    last = {"stall_ms": max(stall_ms.values()), "server": document["server"]}
    report(document, arguments.out, last)


if __name__ == "__main__":
    main()
