"""What a server process has open, asked of it by a signal: nothing of this is in the product."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

SECONDS = 30
"""A generous wait for an answer."""


@dataclass(frozen=True)
class Probe:
    """What one process has open at a moment."""

    tasks: int  # of asyncio
    threads: int
    descriptors: int
    waiting_for: dict[str, int] = field(default_factory=dict)  # tasks, by what they run
    named: dict[str, int] = field(default_factory=dict)  # threads, by their names without a number

    @classmethod
    def here(cls) -> Probe:
        """Of this process, within its event loop."""
        tasks = asyncio.all_tasks()
        names = Counter(getattr(task.get_coro(), "__qualname__", "?") for task in tasks)
        threads = Counter(thread.name.rstrip("0123456789") for thread in threading.enumerate())
        count, opened = threads.total(), open_descriptors("self")
        return cls(len(tasks), count, opened, dict(names), dict(threads))


def open_descriptors(pid: int | str) -> int:
    """The number of files and sockets that a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def install_probe(path: Path) -> None:
    """Answer SIGUSR1 by writing a Probe to a file, from the main thread's event loop."""

    def write(_number: int, _frame: FrameType | None) -> None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(Probe.here())))
        part.rename(path)

    signal.signal(signal.SIGUSR1, write)


def ask_probe(pid: int, path: Path) -> Probe:
    """Ask a process that has installed a probe; raises TimeoutError where it does not answer."""
    path.unlink(missing_ok=True)
    os.kill(pid, signal.SIGUSR1)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text())
            return Probe(**found)
        time.sleep(0.01)
    raise TimeoutError(f"process {pid} does not answer")
