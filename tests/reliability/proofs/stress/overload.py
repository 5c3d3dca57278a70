"""Ten times what the server can do, with clients that do harm: what it accepts stays fast.

An open loop: requests come at random moments that were set before, however slow the answers are.
The engine is a stub whose step takes a set time, so the figures are about the server; it is started
as any engine is. Harm is done by clients that ask and never read, by sockets on which a request
arrives one byte a second, and by one that sends the most expensive bodies, ten a second. Three
processes make the load (good requests, harm, /livez), and each says how late it was itself.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reliability.result import Result
from support.reliability.fork_server import Forked, ForkServer, ServerGone
from support.reliability.small_base import resident_bytes
from support.reliability.stress.loads import Plan, Sent, p99, run_loads
from support.reliability.stress.metrics import Scrape
from support.reliability.stress.process import descendants

STUB = {"step_seconds": 0.02, "most_running": 8}
TOKENS = 20
CAPACITY = STUB["most_running"] / (TOKENS * STUB["step_seconds"])
"""Requests a second that the engine can finish: 20."""
TIMES = 10
NORMAL = 0.8
"""The share of it that is asked for at first: at all of it, queues would grow by chance alone."""
STALLED = 0.2
"""The share of requests whose clients never read."""
DRIPPING = 500
BODIES_A_SECOND = 10
GOODPUT = 0.9
GENERATED = "vllm:generation_tokens_total"
NORMAL_SECONDS = 5
"""What the server may take to be as before, once the load is what it can do."""
AFTERWARDS = 8
"""Seconds of half the load that are watched for that, at full length."""
LATE_SECONDS = 0.1
"""A turn of the event loop may be late by this."""

_GOOD = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
_STALLED = {"max_tokens": TOKENS, "echo": True, "logprobs": 20, "ignore_eos": True, "stream": True}

ALWAYS: Mapping[str, float] = {
    "accepted, and broken off": 0,
    "without an answer": 0,
    "other statuses": 0,
    "/livez that was not 200": 0,
    "memory in MiB": 64,
    "in flight in the end": 0,
}
TIMED: Mapping[str, float] = {
    "p99 of the first token, of that at 1x": 2,
    "p99 of refusals in ms": 50,
    "p99 of /livez in ms": 100,
    "turns of the event loop later than 100 ms": 0,
    "seconds until normal": NORMAL_SECONDS,
    "p99 of the load's own lag in ms": 50,  # or the other times are not the server's
}
"""Limits that say something on a quiet machine alone."""


def worst_bodies(folder: Path) -> list[tuple[str, bool]]:
    """Files of bodies that take a server long to look at, and whether each is a chat's.

    Each is legal in size.
    """
    bodies: dict[str, dict[str, Any]] = {
        "parts": {"messages": [{"role": "user", "content": [{}] * 300_000}]},
        "ids": {"prompt": [-1] * 300_000},
        "numbers": {"messages": [{"role": "user", "content": [1] * 300_000}]},
        "keys": dict.fromkeys(map(str, range(80_000))),
    }
    paths = []
    for name, body in bodies.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(body, separators=(",", ":")))
        paths.append((str(path), "messages" in body))
    return paths


@dataclass(frozen=True)
class _Phase:
    """One load, and what came of it."""

    flows: Mapping[str, Sequence[Sent]]
    counts: Mapping[str, int]  # of requests and connections
    lag: float  # p99 of the latest process of load, in seconds
    late_turns: float  # of the event loop
    tokens: float  # that the engine made while the load lasted

    @property
    def served(self) -> list[Sent]:
        """The good requests that were answered."""
        return [sent for sent in self.flows["good"] if sent.served]

    def first_token_p99(self) -> float:
        """Of those, in seconds."""
        return p99([sent.first for sent in self.served if sent.first is not None])


def _completion(number: int, fields: Mapping[str, Any]) -> str:
    return json.dumps({"prompt": [number, *range(40)], **fields})


def _good(rate: float, **more: Any) -> dict[str, Any]:
    path, body = "/v1/completions", _completion(1, _GOOD)
    flow = {"name": "good", "kind": "request", "rate": rate, "path": path, "body": body}
    return flow | {"addresses": 100, "network": 1} | more


def _harm(folder: Path, seconds: float, dripping: int) -> Plan:
    """The clients that do harm, beside TIMES what the server can do."""
    path, rate = "/v1/completions", STALLED * TIMES * CAPACITY
    stalled = _completion(2, _STALLED)
    flows: list[dict[str, Any]] = [
        {"name": "stalled", "kind": "stall", "rate": rate, "path": path, "body": stalled},
        {"name": "drips", "kind": "drip", "count": dripping, "path": path},
    ]
    files = worst_bodies(folder)
    for file, chat in files:
        route = "/v1/chat/completions" if chat else path
        flow = {"name": Path(file).name, "kind": "request", "file": file, "path": route}
        flows.append(flow | {"rate": BODIES_A_SECOND / len(files)})
    return Plan([flow | {"addresses": 100, "network": 2} for flow in flows], seconds)


def _run(server: Forked, seconds: float, *plans: Plan) -> _Phase:
    """Send the plans; tokens are counted for so many seconds."""
    livez = {"name": "livez", "kind": "request", "rate": 20, "path": "/livez", "network": 3}
    with server.client() as client, ThreadPoolExecutor() as pool:
        before = Scrape.of(client)
        running = pool.submit(run_loads, server.port, *plans, Plan([livez], seconds))
        time.sleep(seconds)
        after = Scrape.of(client)
        found = running.result()
    flows: dict[str, Sequence[Sent]] = {}
    counts: Counter[str] = Counter()
    for each in found:
        flows |= each.flows
        counts.update(each.counts)
    return _Phase(
        flows,
        counts,
        max(each.lag_p99 for each in found),
        after.late_turns(before, LATE_SECONDS),
        after.total(GENERATED) - before.total(GENERATED),
    )


def overload(
    forks: ForkServer,
    folder: Path,
    *,
    seconds: float,
    dripping: int = DRIPPING,
    afterwards: float = AFTERWARDS,
    timed: bool = True,
    defects: Sequence[str] = (),
    settings: Mapping[str, Any] = {},
) -> Result:
    """Send what the server can do at ease, and then ten times what it can do at all.

    Each for so many seconds.

    `timed`: whether times are judged, which want the machine for themselves. `settings`: fields of
    ServerConfig.
    """
    url = f"sqlite:///{folder / 'registry.db'}"
    options = {"engine": "stub", "stub": STUB, "settings": settings, "defects": defects}
    with forks.serving(url, **options) as server:
        once = _run(server, seconds, Plan([_good(NORMAL * CAPACITY)], seconds))
        before = _memory(server)
        flows = [
            _good(TIMES * CAPACITY * (1 - STALLED), until=seconds),
            _good(CAPACITY / 2, name="afterwards", after=seconds),
        ]
        harm = _harm(folder, seconds, dripping)
        much = _run(server, seconds, Plan(flows, seconds + afterwards), harm)
        if server.ended():
            raise ServerGone(server.output.read_text()[-4000:])
        grown = _memory(server) - before
        left = _in_flight(server)
    judged = {**ALWAYS, **(TIMED if timed else {})}
    figures = _figures(once, much, seconds) | {"memory in MiB": grown, "in flight in the end": left}
    return Result(
        goal=f"{TIMES} times what the server can do, with clients that do harm",
        length=f"{seconds:g} s at {NORMAL:g} of what it can do, and at {TIMES} times",
        figures={name: round(value, 3) for name, value in figures.items()},
        at_most=judged,
        at_least={"goodput of the peak": GOODPUT} if timed else {"served": 1, "refused": 1},
    )


def _figures(once: _Phase, much: _Phase, seconds: float) -> dict[str, float]:
    good = much.flows["good"]
    refused = [sent for sent in good if sent.refused]
    normal = once.first_token_p99()
    statuses = Counter(sent.status for sent in good)
    return {
        "served at 1x": len(once.served),
        "refused at 1x": sum(sent.refused for sent in once.flows["good"]),
        "served": len(much.served),
        "refused": len(refused),
        "accepted, and broken off": sum(s.status == 200 and not s.whole for s in good),
        "without an answer": statuses[0],
        "other statuses": len(good) - statuses[0] - statuses[200] - len(refused),
        "goodput of the peak": much.tokens / seconds * STUB["step_seconds"] / STUB["most_running"],
        "p99 of the first token at 1x in ms": 1000 * normal,
        "p99 of the first token, of that at 1x": much.first_token_p99() / max(normal, 1e-3),
        "p99 of refusals in ms": 1000 * p99([s.end for s in refused if s.end is not None]),
        "/livez that was not 200": sum(not sent.served for sent in much.flows["livez"]),
        "p99 of /livez in ms": 1000 * p99([s.end or seconds for s in much.flows["livez"]]),
        "turns of the event loop later than 100 ms": much.late_turns,
        "seconds until normal": _recovery(much.flows["afterwards"], seconds, normal),
        "p99 of the load's own lag in ms": 1000 * max(once.lag, much.lag),
        "readers that stalled": much.counts["stalled"],
        "sockets that dripped": much.counts["drips"],
        "worst bodies": sum(n for name, n in much.counts.items() if name.endswith(".json")),
    }


def _recovery(sent: Sequence[Sent], end: float, normal: float) -> float:
    """Seconds from the end of the overload to the last request that was not as before."""
    odd = [one.due for one in sent if not one.served or (one.first or end) > normal]
    return max(odd, default=end) - end


def _memory(server: Forked) -> float:
    """MiB of the server's process and of what it has started."""
    pids = [server.pid, *(process.pid for process in descendants(server.pid))]
    return sum(map(resident_bytes, pids)) / 2**20


def _in_flight(server: Forked) -> float:
    """Completions that are under way once nobody asks any more, after a generous wait."""
    end = time.monotonic() + 60
    with server.client() as client:
        while (left := Scrape.of(client).total("polyrex_in_flight")) and time.monotonic() < end:
            time.sleep(0.2)
    return left
