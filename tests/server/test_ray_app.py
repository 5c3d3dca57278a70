"""The server under Ray Serve: two replicas over one registry, one of which is killed."""

from __future__ import annotations

import hashlib
import json
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from polyrex.adapters.files.inventory import Inventory
from support.random_inventory import random_router
from support.reliability.ports import reserved_port
from support.reliability.small_base import Routers, SmallBase, quiet_threads
from support.storage.postgres import Cluster

pytest.importorskip("ray", reason="Ray is not installed (pip install 'polyrex[ray]')")

SECONDS = 120  # far more than anything takes, so that a test fails instead of hanging

# `serve run`, in a cluster that ends with this process. Each line names a file for Serve.
DRIVER = """
import sys

import ray
from ray import serve
from ray.serve.scripts import cli

ray.init("local", num_cpus=2, object_store_memory=80_000_000, include_dashboard=False,
         _temp_dir=sys.argv[1], namespace="serve")
for line in sys.stdin:
    cli(["run", "--non-blocking", line.strip()], standalone_mode=False)
serve.shutdown()
ray.shutdown()
"""


def wait_until(condition: Callable[[], bool]) -> bool:
    """Whether the condition holds at last."""
    end = time.monotonic() + SECONDS
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return holds


@dataclass
class Fleet:
    """Two replicas in a Ray cluster, behind its proxy."""

    url: str
    driver: subprocess.Popen[str]
    folder: Path
    settings: dict[str, Any]
    inventory: Inventory
    files: Iterator[int] = field(default_factory=count)

    def deploy(self, replicas: int) -> None:
        """Run the application with this number of replicas."""
        application = {
            "import_path": "polyrex.server.ray_app:app",
            "args": self.settings,
            "deployments": [
                {"name": "polyrex", "num_replicas": replicas, "autoscaling_config": None}
            ],
        }
        options = {"host": "127.0.0.1", "port": httpx.URL(self.url).port}
        file = self.folder / f"{next(self.files)}.yaml"
        file.write_text(json.dumps({"http_options": options, "applications": [application]}))
        assert self.driver.stdin is not None
        self.driver.stdin.write(f"{file}\n")
        self.driver.stdin.flush()

    def replicas(self) -> set[int]:
        """The processes of the replicas."""
        processes = psutil.Process(self.driver.pid).children(recursive=True)
        return {each.pid for each in processes if _title(each).startswith("ray::ServeReplica")}

    def answered(self) -> set[str]:
        """The logs of the replicas that have answered a completion; each replica has its own."""
        logs = self.folder.glob("session_latest/logs/serve/replica_*.log")
        return {log.name for log in logs if "POST /v1/completions 200" in log.read_text()}

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=SECONDS, trust_env=False)

    def all_answer(self, replicas: int) -> bool:
        """Whether so many replicas that have not answered before answer completions at last."""
        before = self.answered()

        def answer() -> bool:
            with self.client() as client, ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda _: client.post("/v1/completions", json=BASE), range(8)))
            return len(self.answered() - before) >= replicas

        return wait_until(answer)


BASE = {"prompt": "1 2 3", "max_tokens": 5, "temperature": 0}
LONG = {"prompt": ["1 2 3"] * 32, "n": 2, "max_tokens": 480, "ignore_eos": True, "stream": True}
"""64 completions in one stream."""
RUNNING = "vllm:num_requests_running"


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallBase:
    return SmallBase.write(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def fleet(
    small: SmallBase, postgres_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """A fleet of two replicas of the embedded engine; a test leaves as many."""
    settings = {
        "base": str(small.base),
        "inventory": str(small.inventory),
        "tasks_dir": str(tmp_path_factory.mktemp("tasks")),
        "insecure": True,
    }
    with tempfile.TemporaryDirectory(prefix="ray-") as name:  # pytest's paths are too long for Ray
        database = {"POLYREX_SERVE_REGISTRY_URL": postgres_cluster.create_database()}
        with reserved_port() as port, _driver(Path(name), database) as driver:
            url = f"http://127.0.0.1:{port}"
            fleet = Fleet(url, driver, Path(name), settings, small.read_inventory())
            fleet.deploy(2)
            with fleet.client() as client:
                assert wait_until(lambda: _ready(client)), (Path(name) / "output").read_text()
            assert fleet.all_answer(2)
            yield fleet


@contextmanager
def _driver(folder: Path, settings: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    environment = quiet_threads() | settings
    environment |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray then listens on loopback alone; nobody else may use the cluster
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    with (
        (folder / "output").open("w") as output,
        subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(folder)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        ) as driver,
    ):
        try:
            yield driver
        finally:
            assert driver.stdin is not None
            driver.stdin.close()
            try:
                driver.wait(60)
            finally:
                driver.kill()


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def running(client: httpx.Client) -> int:
    """Most requests that any of the replicas runs."""
    # at once, because a proxy would send single ones to the replica that has nothing to do
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.get("/metrics").text, range(16)))
    lines = [line for text in answers for line in text.splitlines()]
    return max(int(float(line.split()[-1])) for line in lines if line.startswith(RUNNING))


def register(client: httpx.Client, name: str, router: bytes) -> httpx.Response:
    octets = {"content-type": "application/octet-stream"}
    return client.put(f"/v1/tasks/{name}", content=router, headers=octets)


def test_a_task_is_known_to_both_replicas_once_it_is_acknowledged(fleet: Fleet) -> None:
    answers: dict[str, set[str]] = {}
    with fleet.client() as client, ThreadPoolExecutor(8) as pool:
        for number in range(4):
            name = f"known-{number}"
            registered = register(client, name, random_router(fleet.inventory, number))
            seen = {"x-polyrex-min-revision": registered.headers["x-polyrex-revision"]}
            body = {**BASE, "task": name}
            asked = [
                pool.submit(client.post, "/v1/completions", json=body, headers=seen)
                for _ in range(16)
            ]
            answers[name] = {_text(each.result()) for each in asked}
    assert not [text for each in answers.values() for text in each if "error" in text]
    assert [len(each) for each in answers.values()] == [1, 1, 1, 1]
    assert len(set.union(*answers.values())) > 1
    assert len(fleet.answered()) >= 2


def _text(answer: httpx.Response) -> str:
    """What a completion says, or an error's body."""
    return str(answer.json()["choices"][0]["text"]) if answer.is_success else answer.text


def test_a_stream_passes_the_proxy_as_it_is_made_and_ends_with_its_client(fleet: Fleet) -> None:
    with fleet.client() as client, fleet.client() as other:
        with client.stream("POST", "/v1/completions", json=LONG) as stream:
            lines = stream.iter_lines()
            first = json.loads(next(lines).removeprefix("data: "))
            seen = wait_until(lambda: running(other) > 0)
        gone = wait_until(lambda: running(other) == 0)
    assert first["choices"][0]["finish_reason"] is None
    assert (seen, gone) == (True, True)


@dataclass
class Load:
    """Completions and registrations while replicas come and go."""

    fleet: Fleet
    seen: dict[str, str]  # the header that waits for the task to be known
    statuses: list[int] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)
    acknowledged: dict[str, str] = field(default_factory=dict)
    ended: threading.Event = field(default_factory=threading.Event)

    def complete(self) -> None:
        with self.fleet.client() as client:
            while not self.ended.is_set():
                body = {**BASE, "task": "loaded", "max_tokens": 100, "ignore_eos": True}
                answer = client.post("/v1/completions", json=body, headers=self.seen)
                self.statuses.append(answer.status_code)
                if answer.status_code == 200:
                    self.texts.add(answer.json()["choices"][0]["text"])

    def register(self) -> None:
        routers = Routers(self.fleet.inventory)
        with self.fleet.client() as client:
            for number in count(1):
                if self.ended.is_set():
                    return
                router = routers(number)
                answer = register(client, f"kept-{number}", router)
                self.statuses.append(answer.status_code)
                if answer.status_code == 201:
                    self.acknowledged[f"kept-{number}"] = hashlib.sha256(router).hexdigest()


def test_a_killed_replica_takes_nothing_with_it_but_what_ran_on_it(fleet: Fleet) -> None:
    with fleet.client() as client, ThreadPoolExecutor(6) as pool:
        registered = register(client, "loaded", random_router(fleet.inventory, 9))
        revision = registered.headers["x-polyrex-revision"]
        load = Load(fleet, {"x-polyrex-min-revision": revision})
        work = [pool.submit(load.complete) for _ in range(5)] + [pool.submit(load.register)]
        enough = wait_until(lambda: len(load.acknowledged) >= 20 and len(load.statuses) > 100)
        before = fleet.replicas()
        psutil.Process(min(before)).kill()
        back = fleet.all_answer(1)  # a replica with a log of its own: the one that Ray made anew
        after = fleet.replicas()
        load.ended.set()
        for each in work:
            each.result()
        kept = {
            name: client.get(f"/v1/tasks/{name}").json().get("router_sha256")
            for name in load.acknowledged
        }
    failed = [status for status in load.statuses if status not in (200, 201)]
    assert (enough, back) == (True, True)
    assert (len(after), len(before & after)) == (2, 1)
    assert len(failed) <= 6  # one for each thread: what ran on it when it was killed
    assert len(load.texts) == 1
    assert len(kept) >= 20
    assert kept == load.acknowledged


def test_a_replica_that_is_not_needed_any_more_ends_its_streams_first(fleet: Fleet) -> None:
    begun = threading.Barrier(5)

    def stream() -> str:
        with fleet.client() as client, client.stream("POST", "/v1/completions", json=LONG) as read:
            lines = read.iter_lines()
            first = next(lines)
            begun.wait(SECONDS)
            return "\n".join([first, *lines])

    with ThreadPoolExecutor(4) as pool:
        work = [pool.submit(stream) for _ in range(4)]
        begun.wait(SECONDS)
        fleet.deploy(1)
        texts = [each.result() for each in work]
    fewer = wait_until(lambda: len(fleet.replicas()) == 1)
    fleet.deploy(2)
    back = fleet.all_answer(1)
    assert [text.count('"finish_reason": "length"') for text in texts] == [64] * 4
    assert [text.rstrip().endswith("data: [DONE]") for text in texts] == [True] * 4
    assert (fewer, back) == (True, True)
