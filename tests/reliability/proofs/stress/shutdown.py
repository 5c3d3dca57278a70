"""SIGTERM under load: what was admitted ends well, and nothing is left.

Some servers have time enough for all that they have admitted; others have not, and must say so to
each client, in an error event or an error response. New requests hear that the server is going.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from reliability.result import Result
from support.reliability.client import LOST, Client
from support.reliability.fork_server import Forked, ForkServer
from support.reliability.stress.endings import CUT, ERROR, WHOLE, Ending, asking
from support.reliability.stress.process import descendants

STREAMS, PLAIN = 32, 4
STUB = {"step_seconds": 0.01, "most_running": 64}
DRAINS = (5.0, 0.3)
"""Seconds that a server has for what it has admitted: enough, and too few."""
TOKENS = 80
LATE = 2.0
"""Seconds after its time that a server may take to end."""


@dataclass
class _Run:
    """The ends of many servers."""

    random: random.Random = field(default_factory=lambda: random.Random(0))
    endings: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    latest: float = 0.0
    remarks: list[str] = field(default_factory=list)

    def cycle(self, server: Forked, drain: float, number: signal.Signals) -> None:
        """Let requests run, ask the server to end, and look at how everything ended."""
        children = descendants(server.pid)
        with asking(server.port, _bodies()) as endings:
            time.sleep(self.random.uniform(0, 0.3))
            began = time.monotonic()
            server.send(number)
            self._knock(server)
            ended = server.ended(timeout=drain + 60)
            took = time.monotonic() - began
        self.latest = max(self.latest, took - drain)
        self.counts["servers that did not end, or not with 0"] += not ended or server.status() != 0
        self.counts["processes left"] += _left(children)
        for ending in endings:
            self._judge(ending, drain)

    def _knock(self, server: Forked) -> None:
        """A new request, once the server knows that it has to end."""
        with server.client() as client:
            end = time.monotonic() + 10
            while time.monotonic() < end and not server.ended():
                if _status(client, "GET", "/readyz") == 200:
                    continue
                status = _status(client, "POST", "/v1/completions")
                if not server.ended():
                    self.counts["asked while it ends"] += 1
                    self.counts["not told that it ends"] += status != 503
                return

    def _judge(self, ending: Ending, drain: float) -> None:
        enough = drain == max(DRAINS)
        self.endings[ending.kind] += 1
        wrong = ending.kind == CUT or ending.status in (0, 500)
        self.counts["answers that were cut off"] += wrong
        self.counts["not whole, though there was time"] += enough and ending.kind != WHOLE
        if wrong or (enough and ending.kind != WHOLE):
            self.remarks.append(f"{ending.kind}: {ending.status} {ending.answer[-200:]!r}")


def _status(client: Client, method: str, path: str) -> int:
    body = b'{"prompt": [1], "max_tokens": 1}' if method == "POST" else None
    with suppress(*LOST):
        return client.send(method, path, body, {"content-type": "application/json"}).status
    return 0


def _left(children: Sequence[psutil.Process]) -> int:
    """How many processes run on, a moment after their server has ended."""
    _, left = psutil.wait_procs(list(children), timeout=LATE)
    return len(left)


def _bodies() -> list[dict[str, Any]]:
    body = {"prompt": [9, 9], "max_tokens": TOKENS, "ignore_eos": True}
    return [{**body, "stream": number < STREAMS} for number in range(STREAMS + PLAIN)]


def shutdown(
    forks: ForkServer,
    folder: Path,
    *,
    cycles: int,
    late: float = LATE,
    number: signal.Signals = signal.SIGTERM,
    defects: Sequence[str] = (),
) -> Result:
    """End so many servers. `number`: with SIGKILL, which nobody can answer, limits must fail."""
    run = _Run()
    url = f"sqlite:///{folder / 'registry.db'}"
    for cycle in range(cycles):
        drain = DRAINS[cycle % len(DRAINS)]
        options = {"engine": "stub", "stub": STUB, "settings": {"drain_seconds": drain}}
        with forks.serving(url, defects=defects, **options) as server:
            run.cycle(server, drain, number)
    wrong = (
        *("answers that were cut off", "not whole, though there was time"),
        *("servers that did not end, or not with 0", "processes left", "not told that it ends"),
    )
    latest = {"longest beyond its time in s": round(run.latest, 2)}
    figures = {name: run.counts[name] for name in (*wrong, "asked while it ends")}
    return Result(
        goal="SIGTERM under load",
        length=f"{cycles} servers, {STREAMS} streams and {PLAIN} plain requests on each",
        figures={
            "servers": cycles,
            "whole answers": run.endings[WHOLE],
            "answers that say why they end": run.endings[ERROR],
            **figures,
            **latest,
        },
        at_most={**dict.fromkeys(wrong, 0), **dict.fromkeys(latest, late)},
        at_least={"whole answers": 1, "answers that say why they end": 1, "asked while it ends": 1},
        remarks=run.remarks,
    )
