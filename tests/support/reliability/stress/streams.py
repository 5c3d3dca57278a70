"""Streams that run beside something bad, and must not notice it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from support.reliability.client import LOST, Client, RefusedError

Connect = Callable[[], Client]


@dataclass
class Streams:
    """Clients that ask for the same answers again and again, each for its own."""

    connect: Connect
    bodies: Sequence[dict[str, Any]]
    alone: list[str] = field(default_factory=list)  # their answers when each was asked alone
    whole: int = 0
    broken: list[str] = field(default_factory=list)  # how
    differ: list[str] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)
    _begun: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def ask_alone(self) -> list[str]:
        """The answer to each body while nothing else is asked."""
        with self.connect() as client:
            return [ask(client, body) for body in self.bodies]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Ask over and over while the context lasts; it begins once all have an answer."""
        self.alone = self.ask_alone()
        threads = [threading.Thread(target=self._run, args=(n,)) for n in range(len(self.bodies))]
        for thread in threads:
            thread.start()
        try:
            for _ in threads:
                self._begun.acquire()
            yield
        finally:
            self._over.set()
            for thread in threads:
                thread.join()

    def _run(self, number: int) -> None:
        with self.connect() as client:
            first = True
            while first or not self._over.is_set():
                self._ask(client, number)
                if first:
                    self._begun.release()
                first = False

    def _ask(self, client: Client, number: int) -> None:
        try:
            answer = ask(client, self.bodies[number])
        except (*LOST, RefusedError) as error:
            self.broken.append(f"stream {number}: {type(error).__name__} {error}"[:400])
            return
        self.whole += 1  # near enough: threads may lose a count
        if answer != self.alone[number]:
            self.differ.append(f"stream {number}: {answer}, alone {self.alone[number]}")


def ask(client: Client, body: dict[str, Any]) -> str:
    """The text of a streamed completion. Raises LOST, or RefusedError."""
    text = client.post("/v1/completions", body).text()
    if text is None:
        raise RefusedError("404")
    return text


def good_bodies(count: int, tokens: int, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Greedy completions of different prompts: by a task, and every other one by the base model."""
    return [
        {
            "prompt": [(7 * number + 3 * place) % 400 for place in range(5 + number)],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            **({"task": tasks[number // 2 % len(tasks)]} if number % 2 and tasks else {}),
        }
        for number in range(count)
    ]
