"""Two `polyrex serve` processes on one folder of tasks: the second refuses to start."""

from __future__ import annotations

import time
from pathlib import Path

from reliability.result import Result
from support.reliability.client import LOST
from support.reliability.small_base import Routers, SmallBase
from support.reliability.stress.process import SECONDS, serve_process


def two_servers(small: SmallBase, folder: Path, *, same_folder: bool = True) -> Result:
    """Start a server, register a task, and start another server beside it.

    With another folder for the second, which is what the proof must notice, it starts.
    """
    outputs = folder / "first.txt", folder / "second.txt"
    tasks = folder / "tasks"
    routers = Routers(small.read_inventory())
    with serve_process(small, tasks, outputs[0]) as first:
        first.wait_until_ready()
        with first.client() as client:
            client.put("kept", routers(1))
        refused, named = _second(small, tasks if same_folder else folder / "other", outputs[1])
        with first.client() as client:
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
    with serve_process(small, tasks, output) as second, second.client() as client:
        while second.process.poll() is None:
            try:
                if time.monotonic() > end or client.send("GET", "/readyz").status == 200:
                    return False, False
            except LOST:
                time.sleep(0.1)
    return second.process.returncode != 0, "registry.db" in output.read_text()
