"""One of two replicas is killed under load: nothing acknowledged is lost, the other goes on.

Clients stream completions from both replicas, on the real embedded engine, and register tasks
through both. Only what ran on the killed replica may fail.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from reliability.result import Result
from support.reliability.client import LOST, RefusedError
from support.reliability.fork_server import Forked, ForkServer
from support.reliability.ledger import Examiner, Ledger, lose, reading
from support.reliability.small_base import Routers

from .references import PROMPT, TOKENS, Reference, references

STREAMS = 4
"""Clients that stream, on each replica; as many register."""
TASKS = 20
ANSWERED = "answered"
SECONDS = 120
"""Without an answer for so long, a run has failed."""


@dataclass
class _Run:
    replicas: Sequence[Forked]
    routers: Routers
    reference: Reference
    killed: Forked
    ledger: Ledger = field(default_factory=Ledger)
    number: Iterator[int] = field(default_factory=itertools.count)
    answers: list[Forked] = field(default_factory=list)  # each by the replica that gave it
    wrong: list[str] = field(default_factory=list)  # what failed on the replica that lives on
    broken: int = 0  # what failed on the killed one
    over: threading.Event = field(default_factory=threading.Event)

    def prepare(self) -> None:
        """Register the task that answers, and wait until both replicas serve it."""
        self.ledger.send(ANSWERED, self.reference.router)
        with self.replicas[0].client() as one, self.replicas[1].client() as two:
            revision = one.put(ANSWERED, self.reference.router).revision
            two.complete(ANSWERED, 1, PROMPT, {"x-polyrex-min-revision": str(revision)})

    def threads(self) -> list[threading.Thread]:
        """The clients."""
        return [
            threading.Thread(target=self._work, args=(work, replica, seed))
            for work in (self._complete, self._register)
            for replica in self.replicas
            for seed in range(STREAMS)
        ]

    def _work(self, work: object, replica: Forked, seed: int) -> None:
        assert callable(work)
        while not self.over.is_set():
            try:
                work(replica, seed)
            except (*LOST, RefusedError) as error:
                if replica is not self.killed:
                    self.wrong.append(f"{type(error).__name__} {error}")
                self.broken += 1
                return

    def _complete(self, replica: Forked, _seed: int) -> None:
        with replica.client() as client:
            while not self.over.is_set():
                text = client.complete(ANSWERED, TOKENS, PROMPT).text()
                if text != self.reference.text:
                    self.wrong.append(f"answered {text}, not {self.reference.text}")
                self.answers.append(replica)

    def _register(self, replica: Forked, seed: int) -> None:
        with replica.client() as client:
            while not self.over.is_set():
                number = next(self.number)
                task, router = f"task-{number % TASKS}", self.routers(number)
                sha256 = self.ledger.send(task, router)
                answer = client.put(task, router)
                if answer.status not in (200, 201):
                    raise RefusedError(f"{answer.status} {answer.body!r:.200}")
                self.ledger.acknowledge(task, answer.json()["version"], sha256)
                time.sleep(0.005 * (seed + 1))

    def wait_for(self, registrations: int, answers: int) -> None:
        """Wait until the clients have got so far, or one of them failed where none may."""
        before, moved = self._progress(), time.monotonic()
        while not self.wrong and (before[0] < registrations or before[1] < answers):
            time.sleep(0.01)
            if (now := self._progress()) != before:
                before, moved = now, time.monotonic()
            elif time.monotonic() > moved + SECONDS:
                self.wrong.append(f"nothing has happened for {SECONDS} s")

    def _progress(self) -> tuple[int, int]:
        """Registrations, and answers of the replica that lives on."""
        return len(self.ledger.acknowledged), self.answers.count(self.replicas[1])


def one_killed(forks: ForkServer, url: str, *, registrations: int, forget: int = 0) -> Result:
    """Kill the first of two replicas in the middle of so many registrations.

    `url`: an empty registry on PostgreSQL. `forget`: a planted defect, so many of the newest
    versions are deleted from the database before it is examined.
    """
    with (
        forks.serving(url, engine="embedded") as first,
        forks.serving(url, engine="embedded") as second,
    ):
        run = _Run(
            (first, second),
            Routers(forks.small.read_inventory()),
            references(forks.small, 1)[0],
            first,
        )
        run.prepare()
        threads = run.threads()
        for thread in threads:
            thread.start()
        run.wait_for(registrations // 2, 10)
        first.kill()
        before = len(run.ledger.acknowledged), run.answers.count(second)
        run.wait_for(before[0] + registrations // 2, before[1] + 10)
        run.over.set()
        for thread in threads:
            thread.join()
        examiner, served = _examine(run, forks, url, forget)
        after = run.answers.count(second) - before[1]
    return _result(run, examiner, served, after)


def _examine(run: _Run, forks: ForkServer, url: str, forget: int) -> tuple[Examiner, int]:
    """The database against the ledger; how many tasks a replica that starts now serves as well."""
    examiner = Examiner(run.ledger)
    with reading(url) as engine:
        lose(engine, forget)
        examiner.follow(engine)
        examiner.read_bytes(engine)
    served = 0
    with forks.serving(url) as third:
        for replica in (run.replicas[1], third):
            with replica.client() as client:
                for task, (version, sha256) in examiner.current.items():
                    shown = client.send("GET", f"/v1/tasks/{task}").json()
                    served += (shown["version"], shown["router_sha256"]) == (version, sha256)
    return examiner, served


def _result(run: _Run, examiner: Examiner, served: int, after: int) -> Result:
    found = {kind: examiner.found[kind] for kind in ("lost", "torn", "invented", "gaps")}
    wanted = 2 * len(examiner.current)
    return Result(
        goal="one of two replicas killed under load",
        length=f"{len(run.ledger.acknowledged)} registrations, {2 * STREAMS} streams",
        figures={
            "acknowledged": len(run.ledger.acknowledged),
            **{kind: len(lines) for kind, lines in found.items()},
            "failed on the other replica": len(run.wrong),
            "broken off on the killed replica": run.broken,
            "answers of the other replica afterwards": after,
            "tasks not served by the other and by a new replica": wanted - served,
        },
        at_most={
            **dict.fromkeys(found, 0),
            "failed on the other replica": 0,
            "tasks not served by the other and by a new replica": 0,
        },
        at_least={"answers of the other replica afterwards": 10},
        remarks=[
            *(f"{kind}: {line}" for kind, lines in found.items() for line in lines),
            *run.wrong,
        ],
    )
