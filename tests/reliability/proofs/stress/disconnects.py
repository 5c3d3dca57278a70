"""Clients that leave at random moments: what they had is free again within a second."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from reliability.result import Result
from support.reliability.client import Client
from support.reliability.fork_server import Forked, ForkServer
from support.reliability.stress.endings import COMPLETIONS, leave
from support.reliability.stress.metrics import Scrape

CLIENTS = 16
TOKENS = 450
"""Far more than anybody waits for: without an abort, they take seconds."""
GENERATED = "generated, of the tokens that were asked for"
WITHIN = 1.0  # seconds
MOST_GENERATED = 0.6
"""Of the tokens that were asked for: a quarter of the clients wait for a whole answer."""
PULSES = 0.5  # seconds, in which the engine's process says more than once what it has done
HELD = (
    *("polyrex_in_flight", "vllm:num_requests_running", "vllm:num_requests_waiting"),
    *("vllm:kv_cache_usage_perc", "polyrex_slots_used"),
)


def disconnects(
    forks: ForkServer, url: str, *, count: int, timed: bool = True, defects: Sequence[str] = ()
) -> Result:
    """Let so many clients ask, half of them for a stream, and leave.

    `timed`: whether it is judged how soon what they held is free, or only that it is.
    """
    with forks.serving(url, engine="hosted", defects=defects) as server:
        numbers = iter(range(count))
        threads = [
            threading.Thread(target=_clients, args=(server, numbers, random.Random(seed)))
            for seed in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        with server.client() as client:
            busy = _most_running(client, threads)
            seconds = _seconds_until_free(client)
            held = _held(client)
            time.sleep(PULSES)
            generated = Scrape.of(client).total("vllm:generation_tokens_total")
            again = client.post(COMPLETIONS, {"prompt": [1, 2, 3]}).status
    return Result(
        goal="clients that leave at random moments",
        length=f"{count} clients, {CLIENTS} at once",
        figures={
            "clients that left": count,
            "most completions under way": busy,
            "seconds until all was free": round(seconds, 2),
            GENERATED: round(generated / (count * TOKENS), 3),
            **{f"{name} in the end": value for name, value in held.items()},
            "requests refused afterwards": int(again != 200),
        },
        at_most={
            GENERATED: MOST_GENERATED,
            **{f"{name} in the end": 0 for name in held},
            "requests refused afterwards": 0,
            **({"seconds until all was free": WITHIN} if timed else {}),
        },
        at_least={"clients that left": count, "most completions under way": 1},
    )


def _clients(server: Forked, numbers: Iterator[int], chosen: random.Random) -> None:
    for number in numbers:
        body: dict[str, Any] = {"prompt": [number % 400] * 20, "max_tokens": TOKENS}
        body |= {"ignore_eos": True, "stream": number % 2 == 0}
        leave(server.port, COMPLETIONS, body, chosen)


def _most_running(client: Client, threads: Sequence[threading.Thread]) -> float:
    """The most completions under way that were seen while the clients came and went."""
    most = 0.0
    while any(thread.is_alive() for thread in threads):
        most = max(most, Scrape.of(client).total("polyrex_in_flight"))
        time.sleep(0.05)
    return most


def _held(client: Client) -> dict[str, float]:
    scrape = Scrape.of(client)
    return {name: scrape.total(name) for name in HELD}


def _seconds_until_free(client: Client) -> float:
    began = time.monotonic()
    while any(_held(client).values()) and time.monotonic() < began + 10:
        time.sleep(0.02)
    return time.monotonic() - began
