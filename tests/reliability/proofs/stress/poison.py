"""Every poison of the table amid streams: none of them breaks, and the engine's process stays."""

from __future__ import annotations

import itertools
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from reliability.result import Result
from support.reliability.client import LOST, Answer, Client
from support.reliability.fork_server import ForkServer
from support.reliability.small_base import Routers, SmallBase
from support.reliability.stress.poison import Poison, poisons
from support.reliability.stress.process import descendants, serve_process
from support.reliability.stress.streams import Streams, good_bodies

STREAMS = 32
TASKS = 4
TOKENS = 16
MOST_FOR_ROOM = 0.05
"""The share of poisons that may be told that there is no room: those that ask for much."""

LEAKS = re.compile(
    r"0x[0-9a-f]{6,}|/usr|/tmp|/home|/root|Traceback|site-packages|\.py\b|File \"|"
    r"\b(polyrex|pydantic|msgspec|torch|transformers|starlette|vllm)\.[a-z_]|object at "
)
"""What an error must not tell: addresses, paths, and what the server is made of."""

VLLM = (
    *("--engine", "vllm", "--eager", "--vllm.max-context", "448", "--vllm.max-running", "64"),
    *("--vllm.kv-cache-bytes", str(1 << 25), "--vllm.slots", "8"),
)


class Server(Protocol):
    """A server process."""

    @property
    def pid(self) -> int:
        """Its id."""
        ...

    @property
    def port(self) -> int:
        """Where it listens, on loopback."""
        ...

    def client(self, key: str | None = None) -> Client:
        """A connection to it."""
        ...


@dataclass
class _Firing:
    """Poisons on their way."""

    statuses: Counter[int] = field(default_factory=Counter)
    found: dict[str, list[str]] = field(
        default_factory=lambda: {"lost": [], "server errors": [], "odd answers": [], "leaks": []}
    )
    slowest: float = 0.0

    def fire(self, client: Client, poison: Poison) -> None:
        """Send one, and judge its answer."""
        began = time.monotonic()
        try:
            answer = client.send("POST", poison.path, poison.body, poison.headers)
        except LOST as error:
            self.found["lost"].append(f"{poison.name}: {type(error).__name__} {error}")
            return
        self.slowest = max(self.slowest, time.monotonic() - began)
        self.statuses[answer.status] += 1
        line = f"{poison.name}: {answer.status} {answer.body!r:.200}"
        if answer.status >= 500:
            self.found["server errors"].append(line)
        elif not _is_good(answer):
            self.found["odd answers"].append(line)
        if answer.status != 200 and LEAKS.search(answer.body.decode(errors="replace")):
            self.found["leaks"].append(line)


def _is_good(answer: Answer) -> bool:
    """Whether it is a refusal in the shape of OpenAI's errors, or a whole completion."""
    try:
        body: Any = answer.json()
    except json.JSONDecodeError:
        return False
    if 400 <= answer.status < 500:
        error = body.get("error", {})
        return bool(error.get("message")) and bool(error.get("code")) and len(answer.body) < 1000
    ends = [choice["finish_reason"] for choice in body.get("choices", ())]
    return answer.status == 200 and bool(ends) and set(ends) <= {"stop", "length"}


def poison_embedded(
    forks: ForkServer, url: str, *, count: int, defects: Sequence[str] = ()
) -> Result:
    """Fire so many poisons at the embedded engine."""
    with forks.serving(url, engine="hosted", defects=defects) as server:
        return _result(_poison(server, Routers(forks.small.read_inventory()), count), "embedded")


def poison_vllm(small: SmallBase, folder: Path, *, count: int) -> Result:
    """Fire so many poisons at vLLM."""
    with serve_process(small, folder / "tasks", folder / "output", *VLLM) as server:
        server.wait_until_ready()
        return _result(_poison(server, Routers(small.read_inventory()), count), "vLLM")


@dataclass(frozen=True)
class _Shown:
    """What a firing left behind."""

    streams: Streams
    firing: _Firing
    fired: int
    processes_stay: bool
    same_after: bool


def _poison(server: Server, routers: Routers, count: int) -> _Shown:
    names = [f"good-{number}" for number in range(TASKS)]
    with server.client() as client:
        for number, name in enumerate(names):
            client.put(name, routers(1000 * number))
    streams = Streams(server.client, good_bodies(STREAMS, TOKENS, names))
    firing, before = _Firing(), _processes(server)
    with streams.running(), server.client() as client:
        for poison in _shuffled(count):
            firing.fire(client, poison)
    firing.found["leaks"] += filter(LEAKS.search, streams.broken)
    same = streams.ask_alone() == streams.alone
    return _Shown(streams, firing, count, before == _processes(server), same)


def _shuffled(count: int) -> Iterator[Poison]:
    """So many poisons: the table from its start in another order each time, the same in every run.

    Each comes once before any comes twice.
    """
    chosen, table = random.Random(0), poisons()
    rounds = (chosen.sample(table, len(table)) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(rounds), count)


def _processes(server: Server) -> list[int]:
    """The ids of the server's process and of all that it has started."""
    return sorted([server.pid, *(process.pid for process in descendants(server.pid))])


def _result(shown: _Shown, engine: str) -> Result:
    streams, firing = shown.streams, shown.firing
    wrong = {
        "streams that broke": len(streams.broken),
        "streams with other tokens": len(streams.differ),
        "processes that changed": int(not shown.processes_stay),
        "answers that differ afterwards": int(not shown.same_after),
        **{f"poisons: {kind}": len(lines) for kind, lines in firing.found.items()},
    }
    no_room = firing.statuses[429]
    return Result(
        goal=f"poisons amid {STREAMS} streams, {engine}",
        length=f"{shown.fired} poisons of {len(poisons())} kinds",
        figures={
            "poisons": shown.fired,
            "refused with a 4xx": sum(n for s, n in firing.statuses.items() if 400 <= s < 500),
            "answered with 200": firing.statuses[200],
            "told that there is no room": no_room,
            "whole streams meanwhile": streams.whole,
            "slowest answer to a poison in s": round(firing.slowest, 2),
            **wrong,
        },
        at_most={
            **dict.fromkeys(wrong, 0),
            "told that there is no room": MOST_FOR_ROOM * shown.fired,
        },
        at_least={"poisons": 300, "whole streams meanwhile": STREAMS},
        remarks=[
            *streams.broken,
            *streams.differ,
            *(f"{kind}: {line}" for kind, lines in firing.found.items() for line in lines),
        ],
    )
