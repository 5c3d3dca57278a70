"""Replicas under Ray Serve, in a cluster that ends with the test."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import psutil

from polyrex.adapters.files.inventory import Inventory

from .ports import reserved_port
from .small_base import SmallBase, quiet_threads

BASE = {"prompt": "1 2 3", "max_tokens": 5, "temperature": 0}
"""A completion of the base model."""
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

    def deploy(self, replicas: int | None, autoscaling: Mapping[str, Any] | None = None) -> None:
        """Run the application with this number of replicas; with None, as Ray scales them."""
        application = {
            "import_path": "polyrex.server.ray_app:app",
            "args": self.settings,
            "deployments": [
                {
                    "name": "polyrex",
                    "num_replicas": replicas,
                    "autoscaling_config": autoscaling,
                }
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
        return self.processes("ray::ServeReplica")

    def processes(self, title: str) -> set[int]:
        """The processes of the cluster whose titles begin so."""
        processes = psutil.Process(self.driver.pid).children(recursive=True)
        return {each.pid for each in processes if _title(each).startswith(title)}

    def answered(self) -> set[str]:
        """The logs of the replicas that have answered a completion; each replica has its own."""
        logs = self.folder.glob("session_latest/logs/serve/replica_*.log")
        return {log.name for log in logs if "POST /v1/completions 200" in log.read_text()}

    def client(self) -> httpx.Client:
        """A client of Ray's proxy."""
        return httpx.Client(base_url=self.url, timeout=SECONDS, trust_env=False)

    def all_answer(self, replicas: int) -> bool:
        """Whether so many replicas that have not answered before answer completions at last."""
        before = self.answered()

        def answer() -> bool:
            with self.client() as client, ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda _: client.post("/v1/completions", json=BASE), range(8)))
            return len(self.answered() - before) >= replicas

        return wait_until(answer)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


@contextmanager
def running_fleet(
    small: SmallBase, database: str, replicas: int, **settings: Any
) -> Iterator[Fleet]:
    """So many replicas that answer; `database`: the registry's address."""
    # pytest's paths are too long for Ray
    with tempfile.TemporaryDirectory(prefix="ray-") as name:
        given = {
            "base": str(small.base),
            "inventory": str(small.inventory),
            "tasks_dir": str(Path(name) / "tasks"),
            "insecure": True,
            **settings,
        }
        registry = {"POLYREX_SERVE_REGISTRY_URL": database}
        with reserved_port() as port, _driver(Path(name), registry) as driver:
            url = f"http://127.0.0.1:{port}"
            fleet = Fleet(url, driver, Path(name), given, small.read_inventory())
            fleet.deploy(replicas)
            with fleet.client() as client:
                if not wait_until(lambda: _ready(client)):
                    raise TimeoutError((Path(name) / "output").read_text())
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
