"""A little of everything that a server gets: tasks, streams, mistakes, clients that leave."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import httpx


@dataclass(frozen=True)
class Load:
    """Clients of a server; each sends one request after the other."""

    url: str
    keys: Sequence[str]  # of different tenants
    tasks: Sequence[str]
    clients: int = 4
    pause: float = 0.05  # seconds between two requests of a client

    @contextmanager
    def running(self) -> Iterator[None]:
        """Send requests while the context lasts."""
        stop = threading.Event()
        threads = [
            threading.Thread(target=self._send, args=(number, stop))
            for number in range(self.clients)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def _send(self, number: int, stop: threading.Event) -> None:
        draw = random.Random(number)
        with httpx.Client(base_url=self.url, timeout=60, trust_env=False) as client:
            while not stop.is_set():
                key = draw.choice(self.keys)
                self._one(client, draw, {"authorization": f"Bearer {key}"})
                time.sleep(draw.expovariate(1 / self.pause) if self.pause else 0)

    def _one(self, client: httpx.Client, draw: random.Random, headers: dict[str, str]) -> None:
        body: dict[str, object] = {
            "prompt": "word " * draw.randrange(1, 40),
            "max_tokens": draw.randrange(1, 24),
            "stream": draw.random() < 0.5,
        }
        if draw.random() < 0.8:  # the first tasks are the busiest
            body["task"] = self.tasks[min(int(draw.expovariate(0.7)), len(self.tasks) - 1)]
        kind = draw.random()
        if kind < 0.04:
            body["task"] = "unheard-of"
        elif kind < 0.06:
            body["temperature"] = "hot"
        if kind > 0.95:
            body["stream"] = True
            with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
                next(answer.iter_bytes(), None)  # and goes
        else:
            client.post("/v1/completions", json=body, headers=headers)
