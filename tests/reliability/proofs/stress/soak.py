"""Many mixed requests: what the server keeps of each of them is nothing.

Chats and completions, streamed and plain, by tasks and by the base model, on the real embedded
engine; a tenth of the clients leave at some moment, a twentieth send what is refused, and one
request in a hundred changes a task. Memory is what the processes alone hold, with what was swapped
out of it: pages of files come and go as the system likes.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from reliability.result import Result
from support.reliability.client import Client
from support.reliability.fork_server import Forked, ForkServer
from support.reliability.small_base import Routers, resident_bytes
from support.reliability.stress.endings import leave
from support.reliability.stress.metrics import Scrape
from support.reliability.stress.poison import poisons
from support.reliability.stress.probe import Probe, open_descriptors
from support.reliability.stress.process import descendants

CLIENTS = 8
TASKS = 20
LEAVING, INVALID, CHANGING = 0.10, 0.05, 0.01
KIBIBYTES = 1024
"""Memory that a process may grow by in 10,000 requests."""
CROWD = 4 * CLIENTS
"""Clients before the first look, so that every pool of threads is as large as it will be."""
WARM = 0.1
"""The share of requests after which everything is there that a server keeps anyhow."""
SAMPLES = 200
SECONDS = 60
"""A generous wait for what requests leave behind."""

_SMALL_POISONS = [poison for poison in poisons() if len(poison.body) < 2000]


@dataclass(frozen=True)
class _State:
    """What the server's processes have, when nothing is asked."""

    probe: Probe
    descriptors: int  # of what the server has started
    threads: int

    @classmethod
    def of(cls, server: Forked) -> _State:
        """Look."""
        children = descendants(server.pid)
        return cls(
            server.probe(),
            sum(open_descriptors(child.pid) for child in children),
            sum(child.num_threads() for child in children),
        )


@dataclass
class _Soak:
    """Clients that share one count of requests."""

    server: Forked
    routers: Routers
    requests: int
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[tuple[int, float]] = field(default_factory=list)  # requests so far, KiB
    children: list[tuple[int, float]] = field(default_factory=list)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def run(self, upto: int, clients: int = CLIENTS) -> None:
        """Let so many clients ask until there were so many requests in all."""
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(lambda seed: self._client(seed, upto), range(clients)))

    def register(self) -> None:
        """Register all tasks at once, so that every connection to the database is open."""

        def put(number: int) -> None:
            with self.server.client() as client:
                client.put(f"task-{number % TASKS}", self.routers(1_000_000 + number))
                client.send("GET", f"/v1/tasks/task-{number % TASKS}")

        with ThreadPoolExecutor(CROWD) as pool:
            list(pool.map(put, range(4 * CROWD)))

    def _client(self, seed: int, upto: int) -> None:
        chosen = random.Random(f"{seed} {upto}")
        with self.server.client() as client:
            while (number := next(self._numbers)) < upto:
                try:
                    self._one(client, chosen, number)
                except Exception as error:
                    self.wrong.append(f"request {number}: {type(error).__name__} {error}"[:300])
                if number % max(1, self.requests // SAMPLES) == 0:
                    self._sample(number)

    def _one(self, client: Client, chosen: random.Random, number: int) -> None:
        kind = chosen.random()
        if kind < LEAVING:
            self._leave(chosen)
        elif kind < LEAVING + INVALID:
            poison = chosen.choice(_SMALL_POISONS)
            answer = client.send("POST", poison.path, poison.body, poison.headers)
            self._count("refused", answer.status < 500, f"{poison.name}: {answer.status}")
        elif kind < LEAVING + INVALID + CHANGING:
            self._change(client, chosen, number)
        else:
            self._ask(client, chosen)

    def _count(self, kind: str, well: bool, text: str) -> None:
        self.counts[kind] += 1
        if not well:
            self.wrong.append(text[:300])

    def _ask(self, client: Client, chosen: random.Random) -> None:
        path, body = _question(chosen)
        answer = client.post(path, body)
        if answer.status == 404 and "task" in body:  # it was dropped just now
            self.counts["of a task that is not there"] += 1
        elif body["stream"]:
            ended = answer.body.endswith(b"data: [DONE]\n\n")
            self._count("streamed", answer.status == 200 and ended, f"{answer.status}")
        else:
            choices = answer.status == 200 and answer.json()["choices"]
            self._count("plain", bool(choices), f"{answer.status} {answer.body!r}")

    def _change(self, client: Client, chosen: random.Random, number: int) -> None:
        name = f"task-{chosen.randrange(TASKS)}"
        if chosen.random() < 0.3:
            answer = client.send("DELETE", f"/v1/tasks/{name}")
        else:
            answer = client.put(name, self.routers(number))
        well = answer.status in (200, 201, 204, 404)
        self._count("changes", well, f"{name}: {answer.status} {answer.body!r}")

    def _leave(self, chosen: random.Random) -> None:
        leave(self.server.port, *_question(chosen), chosen)
        self.counts["left"] += 1

    def _sample(self, number: int) -> None:
        self.memory.append((number, resident_bytes(self.server.pid) / 1024))
        own = descendants(self.server.pid)
        self.children.append((number, sum(resident_bytes(child.pid) for child in own) / 1024))

    def settle(self) -> None:
        """Wait until nothing is under way."""
        end = time.monotonic() + SECONDS
        with self.server.client() as client:
            while time.monotonic() < end:
                scrape = Scrape.of(client)
                names = "polyrex_in_flight", "vllm:num_requests_running"
                if not any(scrape.total(name) for name in names):
                    break
                time.sleep(0.2)
        time.sleep(6)  # idle connections are closed after five


def _question(chosen: random.Random) -> tuple[str, dict[str, Any]]:
    """A route, and a body of a good request."""
    body: dict[str, Any] = {
        "max_tokens": chosen.randint(1, 12),
        "stream": chosen.random() < 0.5,
        "temperature": chosen.choice((0, 1)),
        "n": chosen.choice((1, 1, 1, 2)),
    }
    if chosen.random() < 0.6:
        body["task"] = f"task-{chosen.randrange(TASKS)}"
    words = [f"<{chosen.randrange(16, 499)}>" for _ in range(chosen.choice((1, 5, 20, 60)))]
    if chosen.random() < 0.5:
        body |= {"prompt": " ".join(words), "logprobs": chosen.choice((None, 2))}
        return "/v1/completions", body
    return "/v1/chat/completions", body | {
        "messages": [{"role": "user", "content": " ".join(words)}]
    }


def soak(
    forks: ForkServer, url: str, *, requests: int, sloped: bool = True, defects: Sequence[str] = ()
) -> Result:
    """Send so many requests. `sloped`: whether memory is judged; few requests say little of it."""
    with forks.serving(url, engine="hosted", defects=defects) as server:
        running = _Soak(server, Routers(forks.small.read_inventory()), requests)
        warm = round(WARM * requests)
        running.register()
        running.run(warm, CROWD)
        running.settle()
        before = _State.of(server)
        running.run(requests)
        running.settle()
        after = _State.of(server)
    return _result(running, before, after, sloped=sloped)


def _result(running: _Soak, before: _State, after: _State, *, sloped: bool) -> Result:
    left = {
        "asyncio tasks left": after.probe.tasks - before.probe.tasks,
        "threads left": after.probe.threads - before.probe.threads,
        "descriptors left": after.probe.descriptors - before.probe.descriptors,
        "threads left in the engine's process": after.threads - before.threads,
        "descriptors left in the engine's process": after.descriptors - before.descriptors,
        "answers that were wrong": len(running.wrong),
    }
    slopes = {
        "KiB per 10,000 requests": _slope(running.memory),
        "KiB per 10,000 requests in the engine's process": _slope(running.children),
    }
    kinds = "streamed", "plain", "left", "refused", "changes"
    return Result(
        goal="mixed requests: memory, tasks, threads and descriptors stay",
        length=f"{running.requests} requests of {CLIENTS} clients",
        figures={**left, **slopes, **{kind: running.counts[kind] for kind in kinds}},
        at_most={
            **dict.fromkeys(left, 0),
            **(dict.fromkeys(slopes, KIBIBYTES) if sloped else {}),
        },
        at_least=dict.fromkeys(kinds, 1),
        remarks=[
            *running.wrong[:5],
            f"tasks before {before.probe.waiting_for}, after {after.probe.waiting_for}",
            f"threads before {before.probe.named}, after {after.probe.named}",
        ],
    )


def _slope(samples: Sequence[tuple[int, float]]) -> float:
    """Growth per 10,000 requests over the second half."""
    half = sorted(samples)[len(samples) // 2 :]
    if len(half) < 2:
        return 0.0
    numbers, values = zip(*half, strict=True)
    return round(10_000 * statistics.linear_regression(numbers, values).slope, 1)
