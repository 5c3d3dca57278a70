"""`make bench-fit`: how much a fit delays the tokens of running streams.

A server process answers a few streams without a pause. In turns, a task is fitted meanwhile or it
is not; the gaps between the tokens of the streams are compared. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from polyrex.adapters.model.base_model import DEFAULT_BASE
from polyrex.server.config import EngineName
from polyrex.server.launch.loading import shipped_inventory
from polyrex.training.data.tasks import load_tasks

from .harness import Turns, command_line, machine, report
from .server_process import completion, connected, server_process

STREAMS, NEW_TOKENS = 4, 96
QUIET_SECONDS = 30.0
ROWS = 32


@dataclass
class Streams:
    """Streams that run; while `gaps` is a list, it collects the times between their tokens."""

    gaps: list[float] | None = None
    stopped: bool = False

    @contextmanager
    def measured(self) -> Iterator[list[float]]:
        """Collect the gaps, in milliseconds, while the context lasts."""
        found: list[float] = []
        self.gaps = found
        yield found
        self.gaps = None

    def run(self, address: httpx.URL, task: str) -> None:
        """Stream one completion of the task after the other."""
        body = completion(task=task, max_tokens=NEW_TOKENS, stream=True)
        with connected(address) as client:
            while not self.stopped:
                last = None
                for _ in events(client, "/v1/completions", body):
                    now = time.perf_counter()
                    if last is not None and self.gaps is not None:
                        self.gaps.append(1e3 * (now - last))
                    last = now


def events(client: httpx.Client, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events that the server streams in answer to a request."""
    with client.stream("POST", path, json=body, timeout=600) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


@contextmanager
def streaming(address: httpx.URL, tasks: list[str]) -> Iterator[Streams]:
    """One stream a task, started again whenever it ends, while the context lasts."""
    streams = Streams()
    threads = [threading.Thread(target=streams.run, args=(address, task)) for task in tasks]
    for thread in threads:
        thread.start()
    try:
        yield streams
    finally:
        streams.stopped = True
        for thread in threads:
            thread.join()


def fit_seconds(client: httpx.Client, body: dict[str, Any]) -> float:
    """Fit a task; the seconds from the request to the last event."""
    started = time.perf_counter()
    for event in events(client, "/v1/tasks/fitted/fit", body):
        if "error" in event:
            raise RuntimeError(f"the fit failed: {event}")
    return round(time.perf_counter() - started, 1)


def percentile(values: list[float], percent: int) -> float:
    """The value that this share of the values lie below."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def delays(engine: EngineName, body: dict[str, Any], rounds: int) -> dict[str, Any]:
    """The gaps in turns of quiet and fitting; and how long a fit takes on an idle server."""
    turns = Turns()
    loaded: list[float] = []
    gaps: dict[str, list[float]] = {"quiet": [], "fit": []}
    inventory = shipped_inventory(DEFAULT_BASE)
    with server_process(inventory, "--engine", engine) as (client, _):
        idle = fit_seconds(client, body)
        names = [task["name"] for task in client.get("/v1/tasks").json()["data"]]
        with streaming(client.base_url, names[:STREAMS]) as streams:
            for number in range(rounds):
                with streams.measured() as quiet:
                    time.sleep(QUIET_SECONDS)
                with streams.measured() as fitting:
                    loaded.append(fit_seconds(client, body | {"replace": True}))
                for phase, found in ("quiet", quiet), ("fit", fitting):
                    turns.add(phase, percentile(found, 99))
                    gaps[phase] += found
                    print(f"round {number}: {phase} p99 {percentile(found, 99):.0f} ms", flush=True)
    return {
        "fit_seconds_idle": idle,
        "fit_seconds_under_load": loaded,
        "p99_ratio": turns.compare("fit", "quiet").ratio,
        "p99_ratios": [round(ratio, 3) for ratio in turns.ratios("fit", "quiet")],
        "milliseconds": {
            f"{phase} p{percent}": round(percentile(found, percent), 1)
            for phase, found in gaps.items()
            for percent in (50, 99)
        },
        "streams": STREAMS,
        "tokens": {phase: len(found) for phase, found in gaps.items()},
    }


def main() -> None:
    """The command behind `make bench-fit`."""
    parser = command_line(__doc__, rounds=3)
    parser.add_argument("--data", type=Path, required=True, help="folder with manifest.json")
    parser.add_argument("--task", default="winowhy", help="to fit, default: %(default)s")
    for old in ("--rows", "--instruction"):
        parser.add_argument(old, help=argparse.SUPPRESS)
    parser.add_argument("--engine", type=EngineName, default=EngineName.embedded)
    options = parser.parse_args()
    if options.rows or options.instruction:
        parser.error("--rows and --instruction became --data FOLDER and --task NAME")
    (task,) = load_tasks(options.data, (options.task,))
    rows = [
        {"input": row.input, "answer": row.answer, "options": row.options}
        for row in task.rows["train"][:ROWS]
    ]
    body = {"instruction": task.instruction, "rows": rows}
    report(delays(options.engine, body, options.rounds) | {"machine": machine()}, options.out)


if __name__ == "__main__":
    main()
