"""Two replicas on one PostgreSQL registry, while a task is replaced again and again.

Streams ask both replicas for completions, on the real embedded engine. Every answer must be, token
for token, that of one version: of one that could be current when the request began. A version is
superseded from the moment its successor is acknowledged: at once on the replica that acknowledged
it, and for a request with its revision; within a second on the other.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from reliability.result import Result
from support.reliability.client import Client
from support.reliability.fork_server import Forked, ForkServer

from .references import PROMPT, TOKENS, Reference, references

TASK = "updated"
STREAMS = 16
STRETCH = 20
"""Updates in a row that go through one replica."""


@dataclass(frozen=True)
class _Update:
    """One new version; it became current between these times."""

    replica: int
    called: float
    acknowledged: float


@dataclass(frozen=True)
class _Asked:
    """One answer, and how many updates its request knew of."""

    replica: int
    known: int
    called: float
    returned: float
    text: str


@dataclass
class _Run:
    replicas: Sequence[Forked]
    references: Sequence[Reference]
    updates: list[_Update] = field(default_factory=list)
    revision: int = 0  # of the last update
    answers: list[_Asked] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def update(self, replica: int, client: Client) -> None:
        """Give the task its next router."""
        router = self.references[len(self.updates) % len(self.references)].router
        called = time.monotonic()
        answer = client.put(TASK, router)
        if answer.status not in (200, 201):
            self.errors.append(f"update: {answer.status} {answer.body!r:.200}")
            return
        self.revision = answer.revision
        self.updates.append(_Update(replica, called, time.monotonic()))

    def stream(self, number: int) -> None:
        """Ask for one completion after another; every fourth client sends the revision along."""
        replica, knows = number % 2, number % 4 >= 2
        try:
            with self.replicas[replica].client() as client:
                while not self.over.is_set():
                    known = len(self.updates) if knows else 0
                    headers = {"x-polyrex-min-revision": str(self.revision)} if knows else {}
                    called = time.monotonic()
                    text = client.complete(TASK, TOKENS, PROMPT, headers).text()
                    returned = time.monotonic()
                    self.answers.append(_Asked(replica, known, called, returned, text or "none"))
        except Exception as error:
            self.errors.append(f"stream {number}: {type(error).__name__} {error}")

    def converges(self, within: float) -> bool:
        """Whether every replica serves the last version after so many seconds."""
        last = self.references[(len(self.updates) - 1) % len(self.references)].text
        return all(self._serves(replica, last, within) for replica in self.replicas)

    def _serves(self, replica: Forked, text: str, within: float) -> bool:
        end = time.monotonic() + within
        with replica.client() as client:
            while client.complete(TASK, TOKENS, PROMPT).text() != text:
                if time.monotonic() > end:
                    return False
                time.sleep(0.02)
        return True

    def judge(self, within: float) -> tuple[list[str], list[str]]:
        """Answers that are of no version, and answers of a version that was current no more."""
        version_of = {reference.text: n for n, reference in enumerate(self.references)}
        mixed, stale = [], []
        for asked in self.answers:
            first = version_of.get(asked.text)
            if first is None:
                mixed.append(f"{asked.text} is the answer of no version")
            elif not any(
                self._could_answer(number, asked, within)
                for number in range(first, len(self.updates), len(self.references))
            ):
                stale.append(f"the version of update {first} was current no more, or not yet")
        return mixed, stale

    def _could_answer(self, number: int, asked: _Asked, within: float) -> bool:
        if self.updates[number].called > asked.returned or number < asked.known - 1:
            return False
        if number + 1 == len(self.updates):
            return True
        successor = self.updates[number + 1]
        grace = 0 if successor.replica == asked.replica else within
        return asked.called <= successor.acknowledged + grace


def updates(
    forks: ForkServer,
    url: str,
    *,
    updates: int,
    routers: int,
    within: float = 1.0,
    defects: Sequence[str] = (),
) -> Result:
    """Replace one task so many times under streams.

    `url`: an empty registry on PostgreSQL. `routers`: how many different ones take turns. `within`:
    seconds in which a replica has to learn what happened on the other.
    """
    known = references(forks.small, routers)
    with (
        forks.serving(url, engine="embedded", defects=defects) as first,
        forks.serving(url, engine="embedded", defects=defects) as second,
    ):
        run = _Run((first, second), known)
        converged = _under_streams(run, updates, within)
    return _result(run, converged, within)


def _under_streams(run: _Run, updates: int, within: float) -> bool:
    """Let the streams run while the task is replaced; whether replicas agree in the end."""
    streams = [threading.Thread(target=run.stream, args=(n,)) for n in range(STREAMS)]
    with run.replicas[0].client() as one, run.replicas[1].client() as two:
        run.update(0, one)
        run.converges(within)
        try:
            for thread in streams:
                thread.start()
            turns = itertools.cycle([(0, one)] * STRETCH + [(1, two)] * STRETCH)
            for _ in range(updates - 2):
                run.update(*next(turns))
                time.sleep(0.01)
            run.update(0, one)
            return run.converges(within)
        finally:
            run.over.set()
            for thread in streams:
                thread.join()


def _result(run: _Run, converged: bool, within: float) -> Result:
    mixed, stale = run.judge(within)
    return Result(
        goal="two replicas on PostgreSQL, a task replaced under streams",
        length=f"{len(run.updates)} updates, {STREAMS} streams",
        figures={
            "updates": len(run.updates),
            "answers": len(run.answers),
            "answers of no version": len(mixed),
            f"answers older than {within:g} s": len(stale),
            "replicas that do not serve the last version": 0 if converged else 1,
            "errors": len(run.errors),
        },
        at_most={
            "answers of no version": 0,
            f"answers older than {within:g} s": 0,
            "replicas that do not serve the last version": 0,
            "errors": 0,
        },
        at_least={"answers": len(run.updates)},
        remarks=[*mixed, *stale, *run.errors],
    )
