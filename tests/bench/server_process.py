"""A `polyrex serve` process, and the requests that benchmarks send to it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import psutil

from polyrex.adapters.files.inventory import Inventory
from support.random_inventory import random_router
from support.reliability.ports import reserved_port

from .cases import NEW_TOKENS, PROMPT
from .harness import seconds_of

Fields = dict[str, Any]
"""The fields of a request's body that differ from `completion`'s."""


@contextmanager
def server_process(inventory: Path, *options: str) -> Iterator[tuple[httpx.Client, psutil.Process]]:
    """A ready server with nothing registered yet; `options` change its default settings.

    It has no prefix cache: the same prompts are sent many times, and computed every time.
    """
    program = str(Path(sys.executable).with_name("polyrex"))
    command = [program, "serve", "--embedded.no-prefix-cache", "--inventory", str(inventory)]
    with (
        reserved_port() as port,
        tempfile.TemporaryDirectory(prefix="polyrex-tasks-") as tasks,
        connected(f"http://127.0.0.1:{port}") as client,
        subprocess.Popen(
            [*command, "--port", str(port), "--tasks-dir", tasks, *options],
            stdout=subprocess.DEVNULL,
        ) as popen,
    ):
        try:
            while not _ready(client):
                if popen.poll() is not None:
                    raise SystemExit(f"the server ended with status {popen.returncode}")
                time.sleep(0.1)
            yield client, psutil.Process(popen.pid)
        finally:
            popen.terminate()


def connected(address: httpx.URL | str) -> httpx.Client:
    """A client of the server at this address."""
    return httpx.Client(base_url=address, timeout=120, trust_env=False)


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == HTTPStatus.OK
    except httpx.TransportError:
        return False


def register(client: httpx.Client, inventory: Inventory, names: Iterable[str]) -> list[float]:
    """Register random tasks over HTTP; of each, the seconds from sending the request to having the
    whole answer. A name always gets the same router.

    The standard library sends them to the server of `client`: the work that httpx does in Python
    would be a good part of the time.
    """
    seconds = []
    url = client.base_url
    with closing(HTTPConnection(url.host, url.port, timeout=client.timeout.read)) as connection:
        connection.connect()
        for name in names:
            data = random_router(inventory, zlib.crc32(name.encode()), name)
            headers = {"content-type": "application/octet-stream"}
            started = time.perf_counter()
            connection.request("POST", f"/v1/tasks?name={name}", data, headers)
            response = connection.getresponse()
            answer = response.read()
            seconds.append(time.perf_counter() - started)
            if response.status != HTTPStatus.CREATED:
                raise RuntimeError(f"task {name}: {response.status} {answer!r:.400}")
    return seconds


def many(tasks: int) -> list[str]:
    """The names of so many tasks."""
    return [f"many-{number}" for number in range(tasks)]


def completion(**fields: Any) -> Fields:
    """The body of a greedy completion that takes all of its tokens."""
    body = {"prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    return body | fields


def complete(client: httpx.Client, **fields: Any) -> None:
    """Send one completion and wait for its end."""
    client.post("/v1/completions", json=completion(**fields)).raise_for_status()


def tokens_per_second(client: httpx.Client, requests: Sequence[Fields]) -> float:
    """The rate of new tokens when all of these completions are sent at once."""
    with ThreadPoolExecutor(len(requests)) as pool:

        def send() -> None:
            list(pool.map(lambda fields: complete(client, **fields), requests))

        seconds = seconds_of(send)
    return len(requests) * NEW_TOKENS / seconds
