"""Fits over HTTP in which a script plays the worker."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from polyrex.server.requests import fitting
from support.fake_server import Served

ROWS = [{"input": f"thing {n}", "answer": "yes", "options": ["yes", "no"]} for n in range(8)]
BODY = {"instruction": "Is it?", "rows": ROWS}
SCORED = {
    "event": "scored",
    "metric": "rank_classification_accuracy",
    "rows": 2,
    "base": 0.25,
    "adapted": 0.5,
    "standard_error": 0.1,
}

Play = Callable[..., None]
"""`play(events..., router=b"", ending="")`: let a script play the worker."""


def player(patch: pytest.MonkeyPatch, folder: Path, usual: bytes) -> Play:
    """Make a `play`; the script notes its job and its process in the folder.

    `usual`: the router that it writes if none is given.
    """

    def play(*events: dict[str, Any], router: bytes | None = None, ending: str = "") -> None:
        (folder / "router").write_bytes(usual if router is None else router)
        script = (
            "import json, os, shutil, signal, sys, time\n"
            f"open({str(folder / 'pid')!r}, 'w').write(str(os.getpid()))\n"
            "job = json.loads(sys.stdin.readline())\n"
            f"open({str(folder / 'job.json')!r}, 'w').write(json.dumps(job))\n"
            f"shutil.copy({str(folder / 'router')!r}, job['out'])\n"
            f"for event in {list(events)!r}:\n"
            "    print(json.dumps(event), flush=True)\n"
            f"{ending}\n"
        )
        patch.setattr(fitting, "COMMAND", (sys.executable, "-c", script))

    return play


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


PATH = "/v1/tasks/fitted/fit"


def fit_if(
    served: Served, name: str = "fitted", *, replace: bool = False, **headers: str
) -> httpx.Response:
    sent = {key.replace("_", "-"): value for key, value in headers.items()}
    body = BODY | {"replace": replace}
    return served.client.post(f"/v1/tasks/{name}/fit", json=body, headers=sent)


def fit(served: Served, name: str = "fitted", **changes: Any) -> httpx.Response:
    return served.client.post(f"/v1/tasks/{name}/fit", json=BODY | changes)


def until(go: Path) -> str:
    """What a worker runs at its end so that it waits for a file."""
    return f"while not os.path.exists({str(go)!r}): time.sleep(0.01)"
