"""The engine's process is killed or stopped amid streams: clients hear of it, and it comes back.

Each time, every stream must end within two seconds with an error that says so, never as if it were
whole; the server must say that it is not ready, and be ready again without anybody's help, with all
tasks and the same answers.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from reliability.result import Result
from support.reliability.client import LOST, Client
from support.reliability.fork_server import ForkServer
from support.reliability.small_base import Routers, SmallBase
from support.reliability.stress.endings import (
    COMPLETIONS,
    CUT,
    WHOLE,
    Ending,
    asking,
    request_bytes,
)
from support.reliability.stress.process import descendants, serve_process

from .poison import VLLM, Server

STREAMS, PLAIN = 12, 4
TASKS = 3
STUB = {"step_seconds": 0.02, "most_running": 32}
WITHIN = 2.0  # seconds
BACK = 240.0  # seconds: vLLM takes a minute
PROMPT = [5, 6, 7, 8]
TOKENS = 8
IN_A_ROW = 2
"""Faults of one server process whose engine may not fail for ever."""


Strike = Callable[[Server, int], None]
"""What is done to a server, or to a process of its engine that has this id."""


def by_signal(number: signal.Signals) -> Strike:
    """Send a signal to the process."""
    return lambda _server, victim: os.kill(victim, number)


def by_prompt(first: int) -> Strike:
    """Send a prompt that begins with this token, one of the stub engine's switches."""

    def ask(server: Server, _victim: int) -> None:
        body = {"prompt": [first], "max_tokens": 400, "stream": True}
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(request_bytes(COMPLETIONS, body))
            connection.recv(1)  # with an error, once the engine has failed

    return ask


@dataclass
class _Watch:
    """Asks /readyz and /livez all the time."""

    connect: Callable[[], Client]
    not_ready: float = 0.0  # when it was first seen, of time.monotonic
    dead: int = 0  # how often /livez said that only a restart would help
    _over: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator[None]:
        """While the context lasts."""
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _run(self) -> None:
        with self.connect() as client:
            while not self._over.wait(0.02):
                if not self.not_ready and _status(client, "/readyz") != 200:
                    self.not_ready = time.monotonic()
                self.dead += _status(client, "/livez") != 200


def _status(client: Client, path: str) -> int:
    with suppress(*LOST):
        return client.send("GET", path).status
    return 0


@dataclass
class _Run:
    """The faults of one engine."""

    strike: Strike
    within: float = WITHIN
    wrong: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            (
                *("streams that ended as if whole", "answers without an error that says so"),
                *("tasks lost", "other answers afterwards", "times /livez gave up"),
            ),
            0,
        )
    )
    errors: list[float] = field(default_factory=list)  # seconds from each fault to the last end
    unready: list[float] = field(default_factory=list)
    back: list[float] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def fault(self, server: Server, *, deepest: bool) -> None:
        """Let streams run, and kill or stop a process of the engine."""
        with server.client() as client:
            before = _state(client)
        watch = _Watch(server.client)
        victim = _victim(server.pid, deepest=deepest)
        strike = partial(self.strike, server, victim)
        with asking(server.port, _bodies(), again=True) as endings, watch.running():
            began = time.monotonic()
            strike()
            _wait_for(endings)
            self._wait_until_back(server, watch, began)
        self.errors.append(max(ending.at for ending in endings) - began)
        self.unready.append((watch.not_ready or time.monotonic()) - began)
        self.wrong["times /livez gave up"] += watch.dead
        for ending in endings:
            self._judge(ending)
        with server.client() as client:
            after = _state(client)
        self.wrong["tasks lost"] += len(before[0] - after[0])
        self.wrong["other answers afterwards"] += before[1] != after[1]

    def _wait_until_back(self, server: Server, watch: _Watch, began: float) -> None:
        with server.client() as client:
            while time.monotonic() < began + BACK:
                if watch.not_ready and _status(client, "/readyz") == 200:
                    self.back.append(time.monotonic() - began)
                    return
                time.sleep(0.05)
        raise RuntimeError("the engine did not come back")

    def _judge(self, ending: Ending) -> None:
        kind = {
            WHOLE: "streams that ended as if whole",
            CUT: "answers without an error that says so",
        }
        if ending.kind in kind:
            self.wrong[kind[ending.kind]] += 1
            self.remarks.append(f"{ending.kind}: {ending.status} {ending.answer[-200:]!r}")


def _wait_for(endings: Sequence[Ending]) -> None:
    """Until all have ended; asking() joins them, too, but only later."""
    end = time.monotonic() + BACK
    for ending in endings:
        ending.done.wait(max(0, end - time.monotonic()))


def _bodies() -> list[dict[str, Any]]:
    body = {"prompt": [9, 9], "max_tokens": 400, "ignore_eos": True, "temperature": 0}
    tasks: list[dict[str, Any]] = [{}, *({"task": f"kept-{n}"} for n in range(TASKS))]
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    return [
        {**body, **tasks[n % len(tasks)], **(streamed if n < STREAMS else {})}
        for n in range(STREAMS + PLAIN)
    ]


def _state(client: Client) -> tuple[set[str], list[str | None]]:
    """The tasks that are there, and what each answers."""
    shown = client.send("GET", "/v1/models").json()["data"]
    names = {model["id"] for model in shown}
    return names, [client.complete(f"kept-{n}", TOKENS, PROMPT).text() for n in range(TASKS)]


def _victim(server: int, *, deepest: bool) -> int:
    """The engine's process, or the last one that it has started."""
    own = descendants(server)
    hosts = [one for one in own if "polyrex.server.engines.process.host" in one.cmdline()]
    if deepest:
        below = hosts[0].children(recursive=True)
        return int(below[-1].pid if below else hosts[0].pid)
    return int(hosts[0].pid)


def engine_dies(
    forks: ForkServer,
    url: str,
    strike: Strike,
    *,
    engine: str,
    times: int,
    within: float = WITHIN,
    defects: Sequence[str] = (),
) -> Result:
    """Strike so many times. `engine`: stub, or hosted (the embedded one).

    `within`: seconds until all must know; where the engine hangs, those to find that out as well.
    """
    run = _Run(strike, within)
    with forks.serving(url, engine=engine, stub=STUB, defects=defects) as server:
        _register(server, forks.small)
        for _ in range(times):
            run.fault(server, deepest=False)
    return _result(run, engine, times)


def vllm_dies(
    small: SmallBase,
    folder: Path,
    number: signal.Signals,
    *,
    times: int,
    within: float = WITHIN,
) -> Result:
    """The same with vLLM: the process that we start, and in turn the one that vLLM starts."""
    run, done = _Run(by_signal(number), within), 0
    while done < times:
        with serve_process(small, folder / "tasks", folder / "output", *VLLM) as server:
            server.wait_until_ready()
            if not done:
                _register(server, small)
            for _ in range(min(IN_A_ROW, times - done)):
                run.fault(server, deepest=done % 2 == 1)
                done += 1
    return _result(run, "vLLM", times)


def _register(server: Server, small: SmallBase) -> None:
    make = Routers(small.read_inventory())
    with server.client() as client:
        for number in range(TASKS):
            client.put(f"kept-{number}", make(1000 * number))


def _result(run: _Run, engine: str, times: int) -> Result:
    soon = {
        "longest to the last error in s": max(run.errors),
        "longest to not ready in s": max(run.unready),
    }
    return Result(
        goal=f"the engine's process dies or stops amid streams, {engine}",
        length=f"{times} times, {STREAMS} streams and {PLAIN} plain requests",
        figures={
            "times": times,
            "times it came back": len(run.back),
            **{name: round(value, 2) for name, value in soon.items()},
            "longest until it was back in s": round(max(run.back), 1),
            **run.wrong,
        },
        at_most={**dict.fromkeys(run.wrong, 0), **dict.fromkeys(soon, run.within)},
        at_least={"times it came back": times},
        remarks=run.remarks,
    )
