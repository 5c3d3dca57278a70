"""Notes what every Python process does that finds this folder in PYTHONPATH, and those it starts.

Python imports this file by its name at start. Each of the events below becomes one line of JSON,
`[event, what, process]`, in the file that WATCHED_LOG names.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

_EVENTS = {
    "ctypes.dlopen": 0,
    "open": 0,
    "os.exec": 0,
    "os.link": 1,
    "os.listdir": 0,
    "os.mkdir": 0,
    "os.posix_spawn": 0,
    "os.remove": 0,
    "os.rename": 1,
    "os.scandir": 0,
    "os.symlink": 1,
    "os.system": 0,
    "pickle.find_class": 0,
    "socket.bind": 1,
    "socket.connect": 1,
    "socket.getaddrinfo": 0,
    "socket.sendto": 1,
    "sqlite3.connect": 0,
    "subprocess.Popen": 1,
}
"""The events that are noted, and which of their arguments tells what."""


def _watch(path: str) -> None:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        place = _EVENTS.get(event)
        if place is not None:
            what = arguments[place]
            if isinstance(what, bytes):
                what = os.fsdecode(what)
            line = json.dumps([event, what, os.getpid()], default=str)
            os.write(log, line.encode() + b"\n")

    sys.addaudithook(note)


if "WATCHED_LOG" in os.environ:
    _watch(os.environ["WATCHED_LOG"])
