"""Two `polyrex serve` processes on one folder of tasks: the second refuses to start."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reliability.result import Result
from support.reliability.client import LOST, Client
from support.reliability.ports import reserved_port
from support.reliability.small_base import Routers, SmallBase, quiet_threads

SECONDS = 120
"""A generous wait for a server's start or end."""


@contextmanager
def _serve(
    small: SmallBase, folder: Path, output: Path
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A server process, and its port; the context ends it."""
    command = [str(Path(sys.executable).with_name("polyrex")), "serve"]
    command += ["--base", str(small.base), "--inventory", str(small.inventory)]
    command += ["--tasks-dir", str(folder)]
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
            yield port, process
        finally:
            process.terminate()
            try:
                process.wait(SECONDS)
            finally:
                process.kill()


def _wait_until_ready(port: int, process: subprocess.Popen[bytes], output: Path) -> None:
    end = time.monotonic() + SECONDS
    with Client(port) as client:
        while time.monotonic() < end:
            if process.poll() is not None:
                raise RuntimeError(output.read_text())
            try:
                if client.send("GET", "/readyz").status == 200:
                    return
            except LOST:
                time.sleep(0.1)
    raise RuntimeError("the server did not become ready")


def two_servers(small: SmallBase, folder: Path, *, same_folder: bool = True) -> Result:
    """Start a server, register a task, and start another server beside it.

    With another folder for the second, which is what the proof must notice, it starts.
    """
    outputs = folder / "first.txt", folder / "second.txt"
    tasks = folder / "tasks"
    routers = Routers(small.read_inventory())
    with _serve(small, tasks, outputs[0]) as (port, first):
        _wait_until_ready(port, first, outputs[0])
        with Client(port) as client:
            client.put("kept", routers(1))
        refused, named = _second(small, tasks if same_folder else folder / "other", outputs[1])
        with Client(port) as client:
            for number in (2, 3):
                client.put("kept", routers(number))
            shown = client.send("GET", "/v1/tasks/kept").json()
    return Result(
        goal="two servers on one SQLite folder",
        length="2 processes",
        figures={
            "second servers that refused to start": int(refused),
            "messages that name the file": int(named),
            "version that the first serves after two more": shown["version"],
        },
        at_least={
            "second servers that refused to start": 1,
            "messages that name the file": 1,
            "version that the first serves after two more": 3,
        },
        remarks=[outputs[1].read_text()[-1000:]],
    )


def _second(small: SmallBase, tasks: Path, output: Path) -> tuple[bool, bool]:
    """Whether a second server ended with an error, and whether its message names the database."""
    end = time.monotonic() + SECONDS
    with _serve(small, tasks, output) as (port, process), Client(port) as client:
        while process.poll() is None:
            try:
                if time.monotonic() > end or client.send("GET", "/readyz").status == 200:
                    return False, False
            except LOST:
                time.sleep(0.1)
    return process.returncode != 0, "registry.db" in output.read_text()
