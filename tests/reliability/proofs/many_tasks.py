"""A registry of 100,000 tasks beside one of 10: what the many of them cost.

Both registries have a server of the same layout: forked from one process, with the embedded engine
on a tiny model, on which whatever the registry costs shows most. They take turns, so that a figure
is compared with its neighbour.
"""

from __future__ import annotations

import gc
import hashlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, insert, update

from polyrex.server.registry.database import Database
from polyrex.server.registry.principal import OPERATOR
from polyrex.server.registry.schema import audit, routers, state, tasks, versions
from reliability.result import Result
from support.reliability.client import Client
from support.reliability.fork_server import Forked, ForkServer
from support.reliability.small_base import Routers, SmallBase, resident_bytes

from .references import PROMPT

FEW = 10
MEBIBYTES = 400
"""Memory that 100,000 tasks may take; of fewer, their share."""
SAMPLES = 200
"""Pairs of first tokens that are timed; and five times as many registrations."""
LISTED = 10_000

SIZES: Mapping[str, float] = {"memory in MiB": MEBIBYTES, "/metrics in KiB": 256}
TIMES: Mapping[str, float] = {
    "start in s, more than with 10": 5,
    "/metrics in ms": 50,
    f"list of {LISTED} models in ms": 100,
    "time to first token, of that with 10": 1.05,
    "registration in ms, median": 5,
    "registration in ms, p99": 25,
}
"""The limits, for 100,000 tasks."""

_BATCH = 5000


def fill(small: SmallBase, url: str, count: int) -> None:
    """Write so many tasks into an empty registry, as registrations would, but all at once."""
    inventory = small.read_inventory()
    make = Routers(inventory)
    database = Database(url)
    with database.change(OPERATOR) as change:
        numbers = iter(range(1, count + 1))
        while batch := list(islice(numbers, _BATCH)):
            _write(change.connection, batch, make, inventory.sha256, change.id)
        change.revision, change.recorded = count, True
    database.close()


def _write(
    connection: Connection, batch: Sequence[int], make: Routers, inventory: str, change: str
) -> None:
    data = {number: make(number) for number in batch}
    digests = {number: hashlib.sha256(router).digest() for number, router in data.items()}
    now = time.time()
    rows: list[tuple[Any, list[dict[str, Any]]]] = [
        (routers, [{"sha256": digests[n], "data": data[n]} for n in batch]),
        (tasks, [_task(n, now) for n in batch]),
        (versions, [_version(n, digests[n], len(data[n]), inventory, now) for n in batch]),
        (audit, [_audit(n, digests[n], change, now) for n in batch]),
    ]
    for table, values in rows:
        connection.execute(insert(table), values)
    connection.execute(update(state).values(revision=batch[-1]))


def _task(number: int, now: float) -> dict[str, Any]:
    return {
        "id": number,
        "tenant_id": 1,
        "name": f"task-{number}",
        "created": now,
        "changed": number,
        "last_version": 1,
        "current_version": 1,
        "labels": {"team": f"team-{number % 100}"},
    }


def _version(number: int, digest: bytes, size: int, inventory: str, now: float) -> dict[str, Any]:
    return {
        "task_id": number,
        "version": 1,
        "router_sha256": digest,
        "inventory_sha256": inventory,
        "size_bytes": size,
        "created": now,
        "description": f"the task of number {number}",
        "template": None,
        "provenance": {"rows": 32, "steps": 100},
        "scores": {"accuracy": 0.5},
    }


def _audit(number: int, digest: bytes, change: str, now: float) -> dict[str, Any]:
    return {
        "revision": number,
        "change": change,
        "at": now,
        "tenant": OPERATOR.tenant,
        "action": "register",
        "subject": "task",
        "subject_id": str(number),
        "version": 1,
        "router_sha256": digest,
    }


@dataclass(frozen=True)
class _Side:
    """A server, and how long its start took."""

    server: Forked
    started: float
    names: Sequence[str]

    def megabytes(self) -> float:
        """Its memory."""
        return resident_bytes(self.server.pid) / 2**20


@contextmanager
def _side(forks: ForkServer, url: str, count: int, defects: Sequence[str]) -> Iterator[_Side]:
    began = time.perf_counter()
    server = forks.start(url, engine="embedded", defects=defects)
    try:
        server.wait_until_ready()
        names = [f"task-{1 + number * count // FEW}" for number in range(FEW)]
        yield _Side(server, time.perf_counter() - began, names)
    finally:
        server.close()


def many_tasks(
    forks: ForkServer,
    folder: Path,
    *,
    count: int,
    samples: int = 0,
    defects: Sequence[str] = (),
) -> Result:
    """Compare a registry of so many tasks with one of 10; the defects are those of the large one.

    `folder`: an empty one, for the registries. `samples`: pairs of first tokens; without any, no
    times are measured, which say something on a quiet machine alone, and of 10,000 tasks or more.
    """
    urls = {size: f"sqlite:///{folder / str(size)}/registry.db" for size in (FEW, count)}
    for size, url in urls.items():
        (folder / str(size)).mkdir(mode=0o700)
        fill(forks.small, url, size)
    with (
        _side(forks, urls[FEW], FEW, ()) as few,
        _side(forks, urls[count], count, defects) as many,
    ):
        for side in (few, many):
            with side.server.client() as client:
                _first_tokens(client, side.names)
                _page_through(client)
        figures = _sizes(few, many)
        at_most = {**SIZES, "memory in MiB": MEBIBYTES * count / 100_000}
        if samples:
            make = Routers(forks.small.read_inventory())
            figures |= _times(few, many, make, samples)
            at_most |= TIMES
    return Result(
        goal=f"{count} tasks",
        length=f"{count} tasks and {FEW}" + (f", {samples} pairs" if samples else ""),
        figures=figures,
        at_most=at_most,
    )


def _sizes(few: _Side, many: _Side) -> dict[str, float]:
    with many.server.client() as client:
        metrics = client.send("GET", "/metrics").body
    return {
        "memory in MiB": round(many.megabytes() - few.megabytes(), 1),
        "/metrics in KiB": round(len(metrics) / 1024, 1),
    }


def _times(few: _Side, many: _Side, make: Routers, samples: int) -> dict[str, float]:
    with few.server.client() as one, many.server.client() as two:
        ratios = _first_token_ratios((one, few.names), (two, many.names), samples)
        scrapes = [_seconds_of_metrics(two) for _ in range(20)]
        lists = [_seconds_of_models(two) for _ in range(20)]
        registered = _seconds_of_registrations(two, make, 5 * samples)
    return {
        "start in s, more than with 10": round(many.started - few.started, 2),
        "/metrics in ms": round(1000 * statistics.median(scrapes), 1),
        f"list of {LISTED} models in ms": round(1000 * statistics.median(lists), 1),
        "time to first token, of that with 10": round(statistics.median(ratios), 3),
        "registration in ms, median": round(1000 * statistics.median(registered), 2),
        "registration in ms, p99": round(1000 * statistics.quantiles(registered, n=100)[98], 2),
    }


def _first_tokens(client: Client, names: Sequence[str]) -> float:
    """The seconds of one completion of a single token by each task, on average."""
    began = time.perf_counter()
    for name in names:
        if client.complete(name, 1, PROMPT).text() is None:
            raise RuntimeError(f"{name} is not there")
    return (time.perf_counter() - began) / len(names)


def _first_token_ratios(
    few: tuple[Client, Sequence[str]], many: tuple[Client, Sequence[str]], samples: int
) -> list[float]:
    """Of each turn with many tasks, the ratio to the mean of the turns before and after it."""
    gc.collect()
    ratios, before = [], _first_tokens(*few)
    for _ in range(samples):
        between = _first_tokens(*many)
        after = _first_tokens(*few)
        ratios.append(2 * between / (before + after))
        before = after
    return ratios


def _seconds_of_metrics(client: Client) -> float:
    began = time.perf_counter()
    client.send("GET", "/metrics")
    return time.perf_counter() - began


def _seconds_of_models(client: Client) -> float:
    began = time.perf_counter()
    answer = client.send("GET", f"/v1/models?limit={LISTED}")
    seconds = time.perf_counter() - began
    if len(answer.json()["data"]) != LISTED + 1:  # with the base model
        raise RuntimeError(f"{answer.status} {answer.body!r:.200}")
    return seconds


def _seconds_of_registrations(client: Client, make: Routers, count: int) -> list[float]:
    seconds = []
    for number in range(count):
        router = make(1_000_000 + number)
        began = time.perf_counter()
        answer = client.put(f"new-{number}", router)
        seconds.append(time.perf_counter() - began)
        if answer.status != 201:
            raise RuntimeError(f"{answer.status} {answer.body!r:.200}")
    return seconds


def _page_through(client: Client) -> None:
    """What a dashboard asks for: a page of models and of tasks; their memory counts."""
    for path in ("/v1/models?limit=1000", "/v1/tasks?limit=100"):
        if client.send("GET", path).status != 200:
            raise RuntimeError(path)
