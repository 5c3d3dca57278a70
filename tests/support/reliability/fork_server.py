"""Servers that start in milliseconds: one process imports everything, and forks itself.

Each server is the real application over real HTTP, with a registry that it opens itself.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self

from .client import LOST, Client
from .small_base import SmallBase, quiet_threads
from .stress.probe import Probe, ask_probe

TESTS = Path(__file__).parents[2]
SECONDS = 120
"""A generous wait for a server's start."""


class ServerGone(Exception):
    """A server ended before it was ready, and the message is what it wrote; or it never was."""


@dataclass
class Forked:
    """A server process."""

    pid: int
    port: int
    output: Path
    _handle: int  # a pidfd: no other process can have this pid while it is open

    def client(self, key: str | None = None) -> Client:
        """A connection to it."""
        return Client(self.port, key)

    def wait_until_ready(self) -> None:
        """Raises ServerGone where it ends instead, or is not ready after a long time."""
        end = time.monotonic() + SECONDS
        with self.client() as client:
            while time.monotonic() < end:
                try:
                    if client.send("GET", "/readyz").status == HTTPStatus.OK:
                        return
                except LOST as error:
                    if self.ended(timeout=10):
                        raise ServerGone(self.output.read_text()[-4000:]) from error
        raise ServerGone(f"it is not ready after {SECONDS} s")

    def ended(self, timeout: float = 0) -> bool:
        """Whether the process has ended, after at most so many seconds."""
        poll = select.poll()
        poll.register(self._handle, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    def probe(self) -> Probe:
        """What it has open."""
        return ask_probe(self.pid, self.output.with_suffix(".probe"))

    def status(self) -> int | None:
        """The exit status that it came to by itself; None where it was killed, or runs."""
        path = self.output.with_suffix(".status")
        return int(path.read_text()) if path.exists() else None

    def send(self, number: signal.Signals) -> None:
        """Send a signal, and do not wait for what it does."""
        signal.pidfd_send_signal(self._handle, number)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal that ends it, and wait until it has ended."""
        with suppress(ProcessLookupError):
            self.send(number)
        if not self.ended(timeout=30):
            raise RuntimeError(f"process {self.pid} does not end")

    def close(self) -> None:
        """Kill it if it runs."""
        self.kill()
        os.close(self._handle)


class ForkServer:
    """The process that has imported everything, and starts servers."""

    def __init__(self, small: SmallBase, folder: Path) -> None:
        """`folder`: where the servers' output goes."""
        self.small = small
        self._folder = folder
        self._started = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.reliability.forked", small.base, small.inventory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=quiet_threads() | {"PYTHONPATH": _python_path()},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.communicate()  # its input is over: it ends

    def start(
        self,
        url: str,
        *,
        engine: str = "echo",
        defects: Sequence[str] = (),
        keep_versions: int = 1000,
        settings: Mapping[str, Any] = {},
        stub: Mapping[str, Any] = {},
        keys: Sequence[str] = (),
    ) -> Forked:
        """Start a server on a registry; it is not ready yet.

        `engine` is echo or embedded, in the server's process, or hosted or stub, in one of its own,
        the first of which is the embedded one; `defects` are names of planted.py, here and in
        stress/; `settings` are fields of ServerConfig, and `stub` those of StubSettings; with
        `keys`, it asks for one of them.
        """
        self._started += 1
        output = self._folder / f"server-{self._started}.txt"
        order = {
            "url": url,
            "engine": engine,
            "defects": list(defects),
            "keep_versions": keep_versions,
            "settings": dict(settings),
            "stub": dict(stub),
            "keys": list(keys),
            "output": str(output),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return Forked(answer["pid"], answer["port"], output, os.pidfd_open(answer["pid"]))

    @contextmanager
    def serving(self, url: str, **options: Any) -> Iterator[Forked]:
        """A server that is ready, started with these options; the context ends it."""
        server = self.start(url, **options)
        try:
            server.wait_until_ready()
            yield server
        finally:
            server.close()


def _python_path() -> str:
    return os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
