"""`make bench-neighbours`: what a request costs beside busy processes, by how threads wait.

    PYTHONPATH=tests PYTHONSAFEPATH=1 .venv/bin/python -m bench.requests.neighbours --inventory FILE

Threads of OpenMP that wait for each other spin for a while before they sleep. Beside other busy
processes, one spins for another that has no core. Servers that differ in nothing but the variables
of `--contenders` run side by side and take turns: with nothing else to do, one request after
another; all requests at once; and beside as many busy processes as there are cores, one request
after another again. Each figure is compared with the contender's own idle time, or with the first
contender's in the nearest turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from bench.cases import REQUESTS
from bench.harness import Turns, command_line, machine, report, seconds_of
from bench.server_process import complete, completion, server_process, tokens_per_second

IDLE, BUSY, TOGETHER = "idle", "busy", "together"
WARM_UP = 2


def contender(text: str) -> tuple[str, dict[str, str]]:
    """A name, and the variables that it stands for: `passive:OMP_WAIT_POLICY=passive`."""
    name, _, rest = text.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",") if pair]
    if not name or not all(sign for _, sign, _ in pairs):
        raise argparse.ArgumentTypeError(f"expected NAME or NAME:VARIABLE=VALUE,..., got {text!r}")
    return name, {key: value for key, _, value in pairs}


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """This process's variables, for what it starts meanwhile."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes of the same priority that never wait."""
    with ExitStack() as stack:
        for _ in range(count):
            command = [sys.executable, "-c", "while True: pass"]
            # Linux shares the cores among sessions first: each is one of its own.
            busy = subprocess.Popen(command, start_new_session=True)
            stack.callback(busy.wait)
            stack.callback(busy.kill)
        yield


def latencies(client: httpx.Client, requests: int) -> list[float]:
    """Seconds of so many requests, one after another."""
    return [seconds_of(complete, client) for _ in range(requests)]


def summary(samples: list[float]) -> dict[str, float]:
    """Median and 99th percentile, in seconds."""
    p99 = statistics.quantiles(samples, n=100, method="inclusive")[98]
    return {"p50": round(statistics.median(samples), 3), "p99": round(p99, 3)}


def measure(
    clients: Mapping[str, httpx.Client], rounds: int, requests: int, busy_processes: int
) -> dict[str, Any]:
    """All figures of all contenders."""
    samples: dict[str, dict[str, list[float]]] = {name: {IDLE: [], BUSY: []} for name in clients}
    turns = Turns()
    for client in clients.values():
        latencies(client, WARM_UP)
    for _ in range(rounds):
        for name, client in clients.items():
            samples[name][IDLE] += latencies(client, requests)
        for name, client in clients.items():
            turns.add(name, tokens_per_second(client, [completion()] * REQUESTS))
        with neighbours(busy_processes):
            time.sleep(1)
            for name, client in clients.items():
                samples[name][BUSY] += latencies(client, requests)
    first = next(iter(clients))
    figures: dict[str, Any] = {}
    for name, found in samples.items():
        idle, busy = summary(found[IDLE]), summary(found[BUSY])
        figures[name] = {
            "idle_seconds": idle,
            "busy_seconds": busy,
            "busy_p99_over_idle_p50": round(busy["p99"] / idle["p50"], 3),
            "idle_p50_over_first": round(idle["p50"] / summary(samples[first][IDLE])["p50"], 3),
            f"{TOGETHER}_tokens_per_second": turns.medians()[name],
            f"{TOGETHER}_over_first": turns.compare(name, first).ratio if name != first else 1.0,
        }
    return figures


def main() -> None:
    """The command."""
    parser = command_line(__doc__, rounds=3)
    parser.add_argument("--inventory", type=Path, required=True, help="what the servers serve")
    cores = os.cpu_count() or 1
    parser.add_argument("--neighbours", type=int, default=cores, help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=17, help="a turn; default: %(default)s")
    parser.add_argument("--contenders", type=contender, nargs="+", default=[("as_shipped", {})])
    parser.add_argument("--options", nargs="*", default=[], help="of `polyrex serve`")
    options = parser.parse_args()
    with ExitStack() as stack:
        clients = {}
        for name, variables in options.contenders:
            with environment(variables):
                server = server_process(options.inventory, *options.options)
                clients[name], _ = stack.enter_context(server)
        figures = measure(clients, options.rounds, options.requests, options.neighbours)
    document = {
        "neighbours": options.neighbours,
        "requests": options.requests * options.rounds,
        "variables": dict(options.contenders),
        "options": options.options,
        "figures": figures,
        "machine": machine(),
    }
    report(document, options.out)


if __name__ == "__main__":
    main()
