"""kill -9 at any moment of registrations: nothing acknowledged is lost, torn or invented.

Clients register and replace tasks over HTTP, on connections that stay open. The server is killed at
a random moment and started again on the same registry. Then the audit of the registry must hold
every version that was acknowledged, without a gap, and nothing that was never sent; and the server
must serve the routers that it says.
"""

from __future__ import annotations

import itertools
import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Engine

from polyrex.server.registry.archive.checking import check
from polyrex.server.registry.database import Database
from reliability.result import Figures, Result
from support.reliability.client import LOST, Client
from support.reliability.engines import DIGITS
from support.reliability.fork_server import Forked, ForkServer
from support.reliability.ledger import Examiner, Ledger, reading
from support.reliability.small_base import Routers

TASKS = 40
CLIENTS = 4
LOOKED_AT = 8
"""Tasks that are asked for after each start; at the end, all of them are."""
KEPT_VERSIONS = 50
UNDER_LOAD = 0.9
"""The share of kills that must break off a request; between two of its own, a client has none."""
MOST_REFUSED = 100
"""A registry that refuses more than this is killed no more: nothing would ever end it."""

Defects = Sequence[str]


@dataclass
class _Run:
    """One registry, its server in many lives, and its clients."""

    url: str
    forks: ForkServer
    routers: Routers
    defects: Defects
    random: random.Random = field(default_factory=lambda: random.Random(0))
    ledger: Ledger = field(default_factory=Ledger)
    number: Iterator[int] = field(default_factory=itertools.count)
    starts: list[float] = field(default_factory=list)
    early_kills: int = 0
    kills: int = 0  # of a server that was ready, and ran
    kills_with_requests: int = 0
    killed: bool = False  # from the moment on in which the server is killed

    def start(self) -> Forked:
        """Start the server; sometimes it is killed before it is ready, and started again."""
        while True:
            began = time.perf_counter()
            life = self.forks.start(self.url, defects=self.defects, keep_versions=KEPT_VERSIONS)
            if self.random.random() > 0.1 or not self.ledger.sent:
                life.wait_until_ready()
                self.starts.append(time.perf_counter() - began)
                return life
            time.sleep(self.random.uniform(0, 0.1))
            life.close()
            self.early_kills += 1

    def register(self, client: Client, task: str) -> None:
        """Send a router that nobody sent before; raises LOST."""
        router = self.routers(next(self.number))
        sha256 = self.ledger.send(task, router)
        answer = client.put(task, router)
        if answer.status not in (200, 201):
            self.ledger.refuse(answer.status)
            return
        found = answer.json()
        self.ledger.acknowledge(task, found["version"], found["router_sha256"])
        if found["router_sha256"] != sha256:
            self.ledger.twice.append(f"{task}: {sha256} was sent, not {found['router_sha256']}")

    def live(self, life: Forked, wanted: int) -> None:
        """Let clients register until so many were acknowledged; then kill the server."""
        enough = len(self.ledger.acknowledged) + wanted
        broken_off: list[int] = []
        threads = [
            threading.Thread(target=self._client, args=(life.port, seed, broken_off))
            for seed in range(CLIENTS)
        ]
        self.killed = False
        for thread in threads:
            thread.start()
        while (
            len(self.ledger.acknowledged) < enough
            and not self.refuses
            and any(t.is_alive() for t in threads)
        ):
            time.sleep(0.001)
        time.sleep(self.random.uniform(0, 0.004))
        self.killed = True
        self.kills += not life.ended()
        life.close()
        for thread in threads:
            thread.join()
        self.kills_with_requests += bool(broken_off)

    @property
    def refuses(self) -> bool:
        """Whether the server answers, but takes nothing."""
        return self.ledger.refused.total() > MOST_REFUSED

    def _client(self, port: int, seed: int, broken_off: list[int]) -> None:
        """Register one task after another; note whether the kill broke the last one off."""
        chosen = random.Random(f"{len(self.ledger.sent)} {seed}")
        with Client(port) as client:
            while True:
                before = not self.killed
                try:
                    self.register(client, f"task-{chosen.randrange(TASKS)}")
                except LOST:
                    if before:
                        broken_off.append(seed)
                    return


def kills(
    forks: ForkServer, url: str, *, kills: int, acknowledged: int, defects: Defects = ()
) -> Result:
    """Kill the server so many times, while at least so many registrations are acknowledged.

    `url`: an empty registry.
    """
    started = time.perf_counter()
    at_least = {
        "kills": kills,
        "kills with requests in flight": round(UNDER_LOAD * kills),
        "acknowledged": acknowledged,
    }
    with reading(url) as engine:
        run = _Run(url, forks, Routers(forks.small.read_inventory()), defects)
        examiner = Examiner(run.ledger)
        for number in range(kills):
            life = run.start()
            if number:
                _examine(run, examiner, engine, life, LOOKED_AT)
            missing = (acknowledged - len(run.ledger.acknowledged)) / (kills - number)
            run.live(life, max(1, round(run.random.uniform(0.2, 1.8) * missing)))
        while len(run.ledger.acknowledged) < acknowledged and not run.refuses:
            run.live(run.start(), acknowledged - len(run.ledger.acknowledged))
        life = run.start()
        _examine(run, examiner, engine, life, TASKS)
        examiner.follow_again(engine)
        examiner.read_bytes(engine)
        life.close()
    kept = Database(url)
    findings = check(kept)
    kept.close()
    seconds = time.perf_counter() - started
    return _result(run, examiner, findings, seconds, at_least)


def _examine(run: _Run, examiner: Examiner, engine: Engine, life: Forked, count: int) -> None:
    examiner.follow(engine)
    with life.client() as client:
        for task in examiner.sample(run.random, count):
            version, sha256 = examiner.current[task]
            served = client.complete(task, DIGITS, [1]).text()
            shown = client.send("GET", f"/v1/tasks/{task}").json()
            if (served, shown["version"]) != (sha256[:DIGITS], version):
                examiner.found["torn"].append(f"{task}@{version} is {sha256}, served {served}")


def _result(
    run: _Run,
    examiner: Examiner,
    findings: Sequence[str],
    seconds: float,
    at_least: Figures,
) -> Result:
    found = {kind: examiner.found[kind] for kind in ("lost", "torn", "invented", "gaps")}
    found["findings of `polyrex registry check`"] = list(findings)
    acknowledged = len(run.ledger.acknowledged)
    return Result(
        goal=f"kill -9 during registration, {run.url.partition(':')[0]}",
        length=f"{run.kills} kills, {acknowledged} acknowledged, {CLIENTS} clients, {TASKS} tasks",
        figures={
            "kills": run.kills,
            "kills before the server was ready": run.early_kills,
            "kills with requests in flight": run.kills_with_requests,
            "acknowledged": acknowledged,
            **{kind: len(lines) for kind, lines in found.items()},
            "refused": sum(run.ledger.refused.values()),
            "committed, not acknowledged": examiner.unacknowledged(),
            "acknowledged a second": round(acknowledged / seconds),
            "median start in ms": round(1000 * statistics.median(run.starts)),
        },
        at_most=dict.fromkeys([*found, "refused"], 0),
        at_least=at_least,
        remarks=[f"{kind}: {line}" for kind, lines in found.items() for line in lines],
    )
