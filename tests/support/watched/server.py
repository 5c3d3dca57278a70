"""`polyrex serve` with a small model, and all that its processes do is noted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from support.reliability.client import LOST, Client
from support.reliability.ports import reserved_port
from support.reliability.small_base import SmallBase, quiet_threads

POLYREX = str(Path(sys.executable).with_name("polyrex"))
HERE = Path(__file__).parent
KEY = "the-operators-key"


class Event(NamedTuple):
    """Something that one of the processes did."""

    name: str  # of Python's audit event
    what: Any
    process: int


@dataclass(frozen=True)
class Watched:
    """A running server; its files lie in `folder`."""

    folder: Path
    port: int
    process: psutil.Process

    @property
    def state(self) -> Path:
        """The folder of tasks."""
        return self.folder / "tasks"

    @property
    def loras(self) -> Path:
        """The folder that it may load routers from."""
        return self.folder / "loras"

    def client(self) -> Client:
        """A client that is the operator."""
        return Client(self.port, KEY)

    def noted(self) -> int:
        """How much has been noted so far, for `events`."""
        return (self.folder / "log").stat().st_size

    def events(self, since: int = 0) -> list[Event]:
        """What the server and its processes have done since."""
        with (self.folder / "log").open("rb") as log:
            log.seek(since)
            return [Event(*json.loads(line)) for line in log]

    def path(self, what: str) -> Path:
        """A path as the server means it."""
        return Path(os.path.realpath(self.folder / "cwd" / what.removeprefix("file://")))

    def family(self) -> list[psutil.Process]:
        """The server's process, and all that it has started."""
        return [self.process, *self.process.children(recursive=True)]


@contextmanager
def watched_server(
    small: SmallBase, folder: Path, environment: Mapping[str, str] = {}
) -> Iterator[Watched]:
    """A server that is ready; the context ends it."""
    for name in ("cwd", "loras", "temporary"):
        (folder / name).mkdir(parents=True)
    keys = folder / "keys"
    keys.write_text(f"{KEY}\n")
    with reserved_port() as port:
        command: list[str | Path] = [
            POLYREX,
            "serve",
            "--base",
            small.base,
            "--inventory",
            small.inventory,
        ]
        command += ["--tasks-dir", folder / "tasks", "--lora-dir", folder / "loras"]
        command += ["--api-key-file", keys, "--port", str(port)]
        with (folder / "output").open("w") as output:
            popen = subprocess.Popen(
                [*command, "--embedded.kv-cache-tokens", "8192"],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder / "cwd",
                env=_environment(folder) | dict(environment),
            )
        server = Watched(folder, port, psutil.Process(popen.pid))
        try:
            _wait(server, popen)
            yield server
        finally:
            popen.terminate()
            popen.wait(timeout=60)


def _environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    made = quiet_threads() | {
        "PYTHONPATH": path,
        "WATCHED_LOG": str(folder / "log"),
        "TMPDIR": str(folder / "temporary"),
    }
    made.pop("HF_HUB_OFFLINE", None)  # nothing may keep it from the network but itself
    return made


def _wait(server: Watched, popen: subprocess.Popen[bytes]) -> None:
    with server.client() as client:
        while not _ready(client):
            assert popen.poll() is None, (server.folder / "output").read_text()
            time.sleep(0.2)


def _ready(client: Client) -> bool:
    try:
        return client.send("GET", "/readyz").status == 200
    except LOST:
        return False
