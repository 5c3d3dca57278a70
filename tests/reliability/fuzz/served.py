"""A server process on the tiny model, as `polyrex serve` starts it, for programs that fuzz it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

from support.reliability.client import LOST, Client
from support.reliability.ports import reserved_port
from support.reliability.small_base import Routers, SmallBase, quiet_threads
from support.tenants.identities import OPERATOR_KEY

TESTS = Path(__file__).parents[2]
HELD = "held"
"""A task that is there from the beginning."""
SECONDS = 120
"""A generous wait for the server's start."""


@dataclass
class Served:
    """A server process that is ready."""

    process: subprocess.Popen[bytes]
    port: int
    model: str
    output: Path

    def client(self, key: str | None = OPERATOR_KEY) -> Client:
        """A connection to it."""
        return Client(self.port, key)

    @cached_property
    def inference_key(self) -> str:
        """A key that may ask for completions, and change nothing."""
        with self.client() as client:
            made = client.post("/v1/tenants/default/keys", {"role": "inference"}).json()
        key: str = made["key"]
        return key

    def processes(self) -> set[tuple[int, float]]:
        """The server's processes: ids, and when each began."""
        server = psutil.Process(self.process.pid)
        found = [server, *server.children(recursive=True)]
        return {(process.pid, process.create_time()) for process in found}

    def canary(self) -> Any:
        """What a fixed greedy request is answered, with its log-probabilities."""
        body = {
            "prompt": list(range(1, 13)),
            "max_tokens": 24,
            "temperature": 0,
            "logprobs": 3,
            "ignore_eos": True,
        }
        with self.client() as client:
            answer = client.post("/v1/completions", body)
        return answer.json().get("choices", answer.status)

    def tasks(self) -> list[str]:
        """The names of all tasks, up to a thousand."""
        with self.client() as client:
            page = client.send("GET", "/v1/tasks?limit=1000").json()
        return [task["name"] for task in page["data"]]

    def forget(self, router: bytes) -> None:
        """Have one task again, HELD, with one version or more."""
        with self.client() as client:
            for name in self.tasks():
                client.send("DELETE", f"/v1/tasks/{name}")
            client.put(HELD, router)


@contextmanager
def serving(small: SmallBase, folder: Path, *defects: str) -> Iterator[Served]:
    """Run a server with one task, and with defects of planted.py; the context ends it.

    It asks for keys: OPERATOR_KEY is that of a server's administrator.
    """
    keys, lora, output = folder / "keys", folder / "lora", folder / "output"
    keys.write_text(OPERATOR_KEY)
    lora.mkdir()
    (lora / "router.safetensors").write_bytes(Routers(small.read_inventory())(1))
    with reserved_port() as port, output.open("wb") as out:
        options = {
            "base": small.base,
            "inventory": small.inventory,
            "tasks-dir": folder / "tasks",
            "lora-dir": lora,
            "api-key-file": keys,
            "device": "cpu",
            "port": port,
        }
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        launched = ["-m", "reliability.fuzz.planted", *defects, "serve", *flags]
        process = subprocess.Popen(
            [sys.executable, *launched],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(),
        )
        served = Served(process, port, str(small.base), output)
        try:
            _wait(served)
            with served.client() as client:
                client.put(HELD, Routers(small.read_inventory())(0))
            yield served
        finally:
            process.terminate()
            try:
                process.wait(60)
            finally:
                process.kill()


def _wait(served: Served) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if served.process.poll() is not None:
            raise RuntimeError(served.output.read_text()[-4000:])
        with suppress(*LOST), served.client() as client:
            if client.send("GET", "/readyz").status == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"it is not ready after {SECONDS} s")


def kept(name: str) -> Path:
    """A folder of the cache for what a later run needs: a corpus, and what failed."""
    root = Path(os.environ.get("POLYREX_CACHE", TESTS.parent / ".cache"))
    folder = root / "fuzz" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def environment() -> dict[str, str]:
    """The environment of a process that imports the tests."""
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    return quiet_threads() | {"PYTHONPATH": path}
