"""Calls that wait for the registry's database, and completions that need not wait for them."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import httpx
import pytest
from sqlalchemy import event

from polyrex.adapters.files.task import TaskVersion
from polyrex.server.errors import StorageError
from polyrex.server.registry.principal import Principal
from polyrex.server.requests.database_calls import DatabaseCalls
from support.fake_server import Served
from support.random_inventory import MakeRouter
from support.registry.waiting import transactions_that_wait

Pin = Callable[..., TaskVersion | None]

MANY = min(32, (os.cpu_count() or 1) + 4) + 4
"""More requests than the event loop has threads."""


def put(served: Served, name: str, router: bytes) -> httpx.Response:
    headers = {"content-type": "application/octet-stream"}
    return served.client.put(f"/v1/tasks/{name}", content=router, headers=headers)


def test_completions_do_not_wait_for_those_who_register(
    served: Served, make_router: MakeRouter
) -> None:
    for name in ("used", "unused"):
        put(served, name, make_router(1))
    served.complete(task="used")
    file = served.tasks_folder / "registry.db"
    with (
        ThreadPoolExecutor(MANY) as clients,
        closing(sqlite3.connect(file, isolation_level=None)) as other,
    ):
        begun = threading.Event()
        engine = served.registry.database.engine
        event.listen(engine, "checkout", lambda *_: begun.set())
        other.execute("BEGIN IMMEDIATE")
        router = make_router(2)
        waiting = [clients.submit(put, served, f"new-{n}", router) for n in range(MANY)]
        assert begun.wait(30)
        answers = [served.complete(task=name) for name in ("used", "used", "used", "unused")]
        answers.append(served.client.get("/v1/tasks/used"))
        answered_before = [each.done() for each in waiting]
        other.execute("ROLLBACK")
        registered = [each.result().status_code for each in waiting]
    assert [answer.status_code for answer in answers] == [200] * 5
    assert answered_before == [False] * MANY
    assert registered == [201] * MANY


def test_completions_of_tasks_in_memory_do_not_wait_for_those_that_are_read(
    served: Served, make_router: MakeRouter
) -> None:
    names = [f"unused-{number}" for number in range(MANY)]
    for name in ("used", *names):
        put(served, name, make_router(1))
    served.complete(task="used")
    with ThreadPoolExecutor(MANY) as clients:
        with transactions_that_wait(served) as begun:
            waiting = [clients.submit(served.complete, task=name) for name in names]
            assert begun.wait(30)
            used = [served.complete(task="used").status_code for _ in range(3)]
            answered_before = [each.done() for each in waiting]
        read = [each.result().status_code for each in waiting]
    assert used == [200] * 3
    assert answered_before == [False] * MANY
    assert read == [200] * MANY


def test_whether_a_canary_answers_is_drawn_once_also_where_a_router_has_to_be_read(
    served: Served, make_router: MakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str | None] = []

    def noted(pin: Pin) -> Pin:
        def note(asker: Principal, name: str, *, sticky: str | None) -> TaskVersion | None:
            drawn.append(sticky)
            return pin(asker, name, sticky=sticky)

        return note

    for method in ("pin_cached", "pin"):
        monkeypatch.setattr(served.registry, method, noted(getattr(served.registry, method)))
    put(served, "plural", make_router(1))
    assert served.complete(task="plural").status_code == 200
    memory, database = drawn
    assert memory == database is not None
    served.complete(task="plural")
    served.complete(task="plural", user="me")
    assert drawn[2:] == [drawn[2], "me"]
    assert drawn[2] != memory


class Held:
    """Holds the only thread of some calls until it is told to let it go."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.let_go = threading.Event()
        self.made: list[str] = []

    def __call__(self) -> None:
        self.begun.set()
        self.let_go.wait()


async def refusals(calls: DatabaseCalls, held: Held, waiting: int) -> list[object]:
    """What becomes of calls that are made while another one has the thread."""
    first = asyncio.create_task(calls.run(held))
    await asyncio.to_thread(held.begun.wait)
    others = [asyncio.create_task(calls.run(held.made.append, f"{n}")) for n in range(waiting)]
    await asyncio.sleep(0)
    held.let_go.set()
    await first
    outcomes: list[object] = await asyncio.gather(*others, return_exceptions=True)
    calls.close()
    return outcomes


def test_one_call_too_many_is_refused_and_not_made() -> None:
    held = Held()
    one, two, three = asyncio.run(refusals(DatabaseCalls(most=3, threads=1), held, 3))
    assert (one, two) == (None, None)
    assert isinstance(three, StorageError)
    assert held.made == ["0", "1"]


def test_a_call_that_has_waited_for_too_long_is_refused_and_not_made() -> None:
    made: list[str] = []
    calls = DatabaseCalls(most=1, threads=1, patience=0)  # every call is late
    with pytest.raises(StorageError, match="busy; nothing has changed"):
        asyncio.run(calls.run(made.append, "late"))
    calls.close()
    assert made == []


def test_a_call_that_ends_makes_room_whatever_comes_of_it() -> None:
    def fail() -> None:
        raise LookupError

    async def some() -> list[int]:
        done = []
        for number in range(3):
            with pytest.raises(LookupError):
                await calls.run(fail)
            done.append(await calls.run(lambda made: made, number))
        return done

    calls = DatabaseCalls(most=1, threads=1)
    assert asyncio.run(some()) == [0, 1, 2]
    calls.close()
