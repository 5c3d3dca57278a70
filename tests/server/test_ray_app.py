"""The server under Ray Serve: two replicas over one registry, one of which is killed."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count

import httpx
import psutil
import pytest

from support.random_inventory import random_router
from support.reliability.ray_fleet import BASE, SECONDS, Fleet, running_fleet, wait_until
from support.reliability.small_base import Routers, SmallBase
from support.storage.postgres import Cluster

pytest.importorskip("ray", reason="Ray is not installed (pip install 'polyrex[ray]')")

LONG = {"prompt": ["1 2 3"] * 32, "n": 2, "max_tokens": 480, "ignore_eos": True, "stream": True}
"""64 completions in one stream."""
RUNNING = "vllm:num_requests_running"
SCALING = {
    "min_replicas": 1,
    "max_replicas": 2,
    "target_ongoing_requests": 2,
    "metrics_interval_s": 0.5,
    "look_back_period_s": 1,
    "upscale_delay_s": 0.5,
    "downscale_delay_s": 1,
}
"""Ray's autoscaling as our deployment asks for it, but for small batches and quick."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallBase:
    return SmallBase.write(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def fleet(small: SmallBase, postgres_cluster: Cluster) -> Iterator[Fleet]:
    """A fleet of two replicas of the embedded engine; a test leaves as many."""
    with running_fleet(small, postgres_cluster.create_database(), 2) as fleet:
        assert fleet.all_answer(2)
        yield fleet


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


def stays(fleet: Fleet, replicas: int) -> bool:
    """Whether there is this number of replicas for two seconds, and not while one replaces another.

    Ray replaces those whose configuration has changed.
    """
    for _ in range(20):
        if len(fleet.replicas()) != replicas:
            return False
        time.sleep(0.1)
    return True


def test_replicas_come_when_batches_are_full_and_go_when_nothing_waits(fleet: Fleet) -> None:
    fleet.deploy(None, SCALING)
    one = wait_until(lambda: stays(fleet, 1))
    ended = threading.Event()

    def ask() -> None:
        with fleet.client() as client:
            while not ended.is_set():
                client.post("/v1/completions", json={**LONG, "stream": False})

    with ThreadPoolExecutor(6) as pool:
        work = [pool.submit(ask) for _ in range(6)]
        more = wait_until(lambda: stays(fleet, 2))
        ended.set()
        for each in work:
            each.result()
    fewer = wait_until(lambda: stays(fleet, 1))
    fleet.deploy(2)
    back = fleet.all_answer(1)
    assert (one, more, fewer, back) == (True, True, True, True)


def test_a_replica_may_be_of_vllm(small: SmallBase, postgres_cluster: Cluster) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    vllm = {"eager": True, "kv_cache_bytes": 100_000_000, "max_context": 256}
    settings = {"engine": "vllm", "dtype": "float32", "vllm": vllm}
    texts: dict[str, str] = {}
    with (
        running_fleet(small, postgres_cluster.create_database(), 1, **settings) as fleet,
        fleet.client() as client,
    ):
        for number, name in enumerate(("one", "two")):
            register(client, name, random_router(fleet.inventory, number)).raise_for_status()
            texts[name] = _text(client.post("/v1/completions", json={**BASE, "task": name}))
        engines = fleet.processes("VLLM::EngineCore")
    assert len(engines) == 1
    assert not [text for text in texts.values() if "error" in text]
    assert texts["one"] != texts["two"]
