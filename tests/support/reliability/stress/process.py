"""`polyrex serve` on the small base model, as a process, and the processes that it starts."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from support.reliability.client import LOST, Client
from support.reliability.ports import reserved_port
from support.reliability.small_base import SmallBase, quiet_threads

SECONDS = 240
"""A generous wait for a server's start or end: vLLM takes a minute."""


@dataclass(frozen=True)
class Serving:
    """A server process."""

    port: int
    process: subprocess.Popen[bytes]
    output: Path

    @property
    def pid(self) -> int:
        """Of the server; what it has started has others."""
        return self.process.pid

    def client(self, key: str | None = None) -> Client:
        """A connection to it."""
        return Client(self.port, key)

    def wait_until_ready(self) -> None:
        """Raises RuntimeError where it ends instead, or is not ready after a long time."""
        end = time.monotonic() + SECONDS
        with self.client() as client:
            while time.monotonic() < end:
                if self.process.poll() is not None:
                    raise RuntimeError(self.output.read_text()[-4000:])
                with suppress(*LOST):
                    if client.send("GET", "/readyz").status == 200:
                        return
                time.sleep(0.1)
        raise RuntimeError("the server did not become ready")


@contextmanager
def serve_process(
    small: SmallBase, folder: Path, output: Path, *arguments: str
) -> Iterator[Serving]:
    """A server that has been started, with its tasks in `folder`; the context ends it."""
    command = [str(Path(sys.executable).with_name("polyrex")), "serve"]
    command += ["--base", str(small.base), "--inventory", str(small.inventory)]
    command += ["--tasks-dir", str(folder), *arguments]
    with (
        reserved_port() as port,
        output.open("wb") as out,
        subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=quiet_threads(),
        ) as process,
    ):
        try:
            yield Serving(port, process, output)
        finally:
            process.terminate()
            try:
                process.wait(SECONDS)
            finally:
                process.kill()


def descendants(pid: int) -> list[psutil.Process]:
    """The processes that a process has started, with all that these have, and that run."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found
