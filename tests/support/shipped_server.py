"""A real server process with the shipped inventory, for examples and for what docs show."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from support.reliability.ports import reserved_port

POLYREX = str(Path(sys.executable).with_name("polyrex"))


@contextmanager
def shipped_server(folder: Path) -> Iterator[str]:
    """The address of a `polyrex serve` with its tasks in `folder`; the context stops it."""
    output = folder / "output"
    command = [POLYREX, "serve", "--tasks-dir", str(folder / "tasks")]
    # Beside other processes, threads that spin while they wait take the core from each other.
    environment = {"OMP_WAIT_POLICY": "passive"} | os.environ
    with (
        reserved_port() as port,
        output.open("w") as out,
        subprocess.Popen(
            [*command, "--port", str(port)], stdout=out, stderr=subprocess.STDOUT, env=environment
        ) as server,
    ):
        url = f"http://127.0.0.1:{port}"
        try:
            while not _ready(url):
                assert server.poll() is None, output.read_text()
                time.sleep(0.2)
            yield url
        finally:
            server.terminate()


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
