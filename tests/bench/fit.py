"""`make bench-fit`: what running streams feel of a task that is being fitted.

A server process answers a few streams without a pause. A task is fitted meanwhile, then not, in
turns; the gaps between the tokens of the streams are compared. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from polyrex.adapters.model.base_model import DEFAULT_BASE
from polyrex.server.config import EngineName
from polyrex.server.launch.loading import shipped_inventory

from .serving import machine, server_process

STREAMS, NEW_TOKENS = 4, 96
QUIET_SECONDS = 30.0
PROMPT = "The capital of France is a very nice city and I would like to visit it because"


@dataclass
class Gaps:
    """Seconds between tokens, in the phase that is being measured; None while none is."""

    phase: str | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)
    stopped: bool = False

    def add(self, gap: float) -> None:
        """Note one gap, from any thread."""
        if self.phase is not None:
            self.seconds.setdefault(self.phase, []).append(gap)


@contextmanager
def streaming(address: httpx.URL, tasks: list[str]) -> Iterator[Gaps]:
    """Streams that begin anew whenever they end, one a task, while the context lasts."""
    gaps = Gaps()
    threads = [threading.Thread(target=_stream, args=(address, task, gaps)) for task in tasks]
    for thread in threads:
        thread.start()
    try:
        yield gaps
    finally:
        gaps.stopped = True
        for thread in threads:
            thread.join()


def _stream(address: httpx.URL, task: str, gaps: Gaps) -> None:
    body = {
        "task": task,
        "prompt": PROMPT,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    with httpx.Client(base_url=address, timeout=120, trust_env=False) as client:
        while not gaps.stopped:
            last = None
            with client.stream("POST", "/v1/completions", json=body) as response:
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        now = time.perf_counter()
                        if last is not None:
                            gaps.add(now - last)
                        last = now


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of the values lie below."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def fit_once(client: httpx.Client, name: str, body: dict[str, Any]) -> dict[str, Any]:
    """Fit a task; its last event, with the seconds from the request to it."""
    started = time.perf_counter()
    last: dict[str, Any] = {}
    with client.stream("POST", f"/v1/tasks/{name}/fit", json=body, timeout=600) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                last = json.loads(line.removeprefix("data: "))
    return last | {"seconds": round(time.perf_counter() - started, 1)}


def measure(engine: EngineName, body: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Gaps in turns of quiet and fitting; and how long a fit takes with the server idle."""
    found: list[dict[str, Any]] = []
    ratios = []
    inventory = shipped_inventory(DEFAULT_BASE)
    with (
        tempfile.TemporaryDirectory(prefix="polyrex-tasks-") as folder,
        server_process(inventory, Path(folder), "--engine", engine) as (client, _),
    ):
        idle = fit_once(client, "fitted", body)
        names = [task["name"] for task in client.get("/v1/tasks").json()["data"]]
        with streaming(client.base_url, names[:STREAMS]) as gaps:
            for number in range(rounds):
                gaps.phase = f"quiet {number}"
                time.sleep(QUIET_SECONDS)
                gaps.phase = f"fit {number}"
                found.append(fit_once(client, "fitted", body | {"replace": True}))
                gaps.phase = None
                fitting, quiet = (
                    percentile(gaps.seconds[f"{phase} {number}"], 0.99)
                    for phase in ("fit", "quiet")
                )
                ratios.append(fitting / quiet)
                print(f"round {number}: p99 {1e3 * fitting:.0f} / {1e3 * quiet:.0f} ms", flush=True)
    everything = {
        phase: [gap for name, own in gaps.seconds.items() if name.startswith(phase) for gap in own]
        for phase in ("quiet", "fit")
    }
    return {
        "fit_seconds_idle": idle["seconds"],
        "fit_seconds_under_load": [each["seconds"] for each in found],
        "p99_ratio": round(statistics.median(ratios), 3),
        "p99_ratios": [round(ratio, 3) for ratio in ratios],
        "milliseconds": {
            f"{phase} p{share}": round(1e3 * percentile(own, share / 100), 1)
            for phase, own in everything.items()
            for share in (50, 99)
        },
        "streams": STREAMS,
        "tokens": {phase: len(own) for phase, own in everything.items()},
    }


def main() -> None:
    """The command behind `make bench-fit`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines with a `split`")
    parser.add_argument("--instruction", required=True)
    parser.add_argument("--engine", type=EngineName, default=EngineName.embedded)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()]
    train = [
        {key: row[key] for key in ("input", "answer", "options")}
        for row in rows
        if row["split"] == "train"
    ]
    body = {"instruction": options.instruction, "rows": train[:32]}
    result = measure(options.engine, body, options.rounds) | {"machine": machine()}
    if options.out:
        options.out.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
