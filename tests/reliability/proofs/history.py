"""A history of puts, gets and drops through two replicas, and whether it is linearisable.

A get is a completion: it shows which router a replica's index pins, not what the database holds.
Clients that pass the newest revision on to each other must see one register a task, whichever
replica they ask. Without revisions, a get may be a second behind, and no more.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from reliability.result import Result
from support.reliability.client import Answer, Client
from support.reliability.engines import DIGITS
from support.reliability.fork_server import Forked, ForkServer
from support.reliability.linearisability import Kind, Operation, too_old, violations
from support.reliability.small_base import Routers

CLIENTS = 8
TASKS = 10
MIN_REVISION = "x-polyrex-min-revision"


@dataclass
class _Run:
    replicas: Sequence[Forked]
    routers: Routers
    operations: int  # that are wanted
    with_revisions: bool
    one_writes: bool
    history: list[Operation] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    newest: int = 0  # revision that any client was told of
    number: Iterator[int] = field(default_factory=itertools.count)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def client(self, seed: int) -> None:
        """Random operations through random replicas, one after another."""
        chosen = random.Random(seed)
        with self.replicas[0].client() as one, self.replicas[1].client() as two:
            while len(self.history) < self.operations and not self.errors:
                task = f"register-{chosen.randrange(TASKS)}"
                kind = chosen.choices(list(Kind), weights=(40, 50, 10))[0]
                try:
                    client = chosen.choice((one, two))
                    if self.one_writes and kind is not Kind.get:
                        client = one
                    self.history.append(self._operate(client, kind, task))
                except Exception as error:
                    self.errors.append(f"{kind} {task}: {type(error).__name__} {error}")

    def _operate(self, client: Client, kind: Kind, task: str) -> Operation:
        headers = {MIN_REVISION: str(self.newest)} if self.with_revisions else {}
        called = time.monotonic()
        if kind is Kind.put:
            router = self.routers(next(self.number))
            value = hashlib.sha256(router).hexdigest()[:DIGITS]
            self._learn(client.put(task, router, headers), (200, 201))
        elif kind is Kind.drop:
            value = None
            answer = client.send("DELETE", f"/v1/tasks/{task}", headers=headers)
            if self._learn(answer, (200, 404)) == 404:
                kind = Kind.get  # that is all that it has done
        else:
            answer = client.complete(task, DIGITS, [1], headers)
            value = answer.text()
            if self.with_revisions:
                # The answer of a completion names no revision; this replica's next answer names
                # one that is not older than what the completion has shown.
                self._learn(client.send("GET", "/v1/tasks?limit=1"), (200,))
        return Operation(task, kind, value, called, time.monotonic())

    def _learn(self, answer: Answer, expected: tuple[int, ...]) -> int:
        if answer.status not in expected:
            raise RuntimeError(f"{answer.status} {answer.body!r:.200}")
        if "x-polyrex-revision" in answer.headers:
            with self.lock:
                self.newest = max(self.newest, answer.revision)
        return answer.status


def history(
    forks: ForkServer,
    url: str,
    *,
    operations: int,
    with_revisions: bool,
    within: float = 1.0,
    one_writes: bool = False,
    defects: Sequence[str] = (),
) -> Result:
    """Record so many operations, and look for an order that explains them.

    `url`: an empty registry on PostgreSQL. `within`: seconds that a get without a revision may be
    behind. `one_writes`: the second replica is asked to read alone; what it writes itself would
    tell it of the other's changes, however deaf it is.
    """
    with (
        forks.serving(url, defects=defects) as first,
        forks.serving(url, defects=defects) as second,
    ):
        routers = Routers(forks.small.read_inventory())
        run = _Run((first, second), routers, operations, with_revisions, one_writes)
        threads = [threading.Thread(target=run.client, args=(seed,)) for seed in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # Changes are linearisable in any case; without revisions, gets are of another kind.
    changes = [operation for operation in run.history if operation.kind is not Kind.get]
    wrong = violations(run.history if with_revisions else changes)
    old = [] if with_revisions else too_old(run.history, within)
    strictness = "with revisions" if with_revisions else f"without revisions, {within:g} s behind"
    return Result(
        goal=f"a history of operations is linearisable, {strictness}",
        length=f"{len(run.history)} operations, {CLIENTS} clients, {TASKS} tasks, 2 replicas",
        figures={
            "operations": len(run.history),
            "tasks with no possible order": len(wrong),
            "gets that are too old": len(old),
            "errors": len(run.errors),
        },
        at_most={"tasks with no possible order": 0, "gets that are too old": 0, "errors": 0},
        at_least={"operations": operations},
        remarks=[
            *(f"{task}: no order explains it" for task in wrong),
            *(f"{get.key}: {get.value} was replaced long before" for get in old),
            *run.errors,
        ],
    )
