"""What /metrics says, and what it must never say."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest

from polyrex.server.engines.base import EngineStats
from polyrex.server.observability.few_names import FewNames
from polyrex.server.observability.requests import RequestRecord
from polyrex.server.observability.usage import MOST_TASKS, MOST_TENANTS, OTHER, Usage
from polyrex.server.registry.principal import Principal
from support.fake_server import FakeEngine, Serve, Served
from support.observability.waiting import eventually
from support.random_inventory import MakeRouter
from support.tenants.identities import OPERATOR_DIGESTS, OPERATOR_KEY, bearer, make_key, make_tenant

LINE = re.compile(r"(?P<name>[\w:]+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
LABEL = re.compile(r'(\w+)="([^"]*)"')

Found = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


def read(client: httpx.Client, **headers: str) -> Found:
    """The figures of /metrics by name and labels."""
    found = {}
    for line in client.get("/metrics", headers=headers).text.splitlines():
        match = LINE.fullmatch(line)
        if match and not line.startswith("#"):
            key = match["name"], frozenset(LABEL.findall(match["labels"] or ""))
            found[key] = float(match["value"])
    return found


def value(found: Found, name: str, **labels: str) -> float | None:
    return found.get((name, frozenset(labels.items())))


def register(client: httpx.Client, name: str, data: bytes) -> None:
    headers = {"content-type": "application/octet-stream"}
    client.put(f"/v1/tasks/{name}", content=data, headers=headers).raise_for_status()


VLLM = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:prompt_tokens_total": "counter",
    "vllm:generation_tokens_total": "counter",
    "vllm:prefix_cache_queries_total": "counter",
    "vllm:prefix_cache_hits_total": "counter",
    "vllm:num_preemptions_total": "counter",
    "vllm:request_success_total": "counter",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:request_time_per_output_token_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_prompt_tokens": "histogram",
    "vllm:request_generation_tokens": "histogram",
}


def test_names_of_vllm_have_its_types_and_labels(served: Served) -> None:
    text = served.client.get("/metrics").text
    types = dict(re.findall(r"# TYPE (vllm:\S+) (\w+)", text))
    assert {name: types.get(name) for name in VLLM} == VLLM
    for name in VLLM:
        (line, *_) = re.findall(rf"^{name}(?:_bucket)?\{{(.*)\}} ", text, re.MULTILINE)
        assert ('model_name="base"' in line, 'engine="0"' in line) == (True, True), line


class Sized(FakeEngine):
    """An engine that tells the size of its cache."""

    def stats(self) -> EngineStats:
        return replace(super().stats(), kv_block_size=16, kv_blocks=512, preemptions=2, restarts=1)


def test_gateways_find_what_they_choose_a_replica_by(serve: Serve) -> None:
    found = read(serve(Sized()).client)
    assert (
        value(found, "vllm:cache_config_info", block_size="16", num_gpu_blocks="512", engine="0")
        == 1
    )
    (adapters,) = [(dict(labels), v) for (name, labels), v in found.items() if "lora" in name]
    lists = {"running_lora_adapters": "", "waiting_lora_adapters": ""}
    assert adapters[0] == {"max_lora": "1000000", **lists}
    assert adapters[1] > 1e9  # a time, as vLLM's; the newest series counts
    assert value(found, "vllm:num_preemptions_total", model_name="base", engine="0") == 2
    assert value(found, "polyrex_engine_restarts_total") == 1


def test_a_server_says_whether_it_is_ready(served: Served) -> None:
    assert value(read(served.client), "polyrex_ready") == 1
    served.engine.down = True
    assert value(read(served.client), "polyrex_ready") == 0


def test_completions_are_counted_by_tenant_and_task(
    served: Served, make_router: MakeRouter
) -> None:
    register(served.client, "plural", make_router(0))
    for _ in range(3):  # the second name costs a second use
        assert served.complete(task="plural", max_tokens=4).status_code == 200
        assert served.complete(max_tokens=2).status_code == 200

    def counted() -> bool:
        found = read(served.client)
        task = {"tenant": "default", "task": "plural"}
        base = {"tenant": "", "task": "(base)"}
        other = {"tenant": "", "task": OTHER}
        return (
            value(found, "polyrex_task_requests_total", **task) == 3
            and value(found, "polyrex_task_tokens_total", **task, kind="generation") == 12
            and value(found, "polyrex_task_tokens_total", **task, kind="prompt") == 3
            and value(found, "polyrex_task_requests_total", **base) == 2
            and value(found, "polyrex_task_requests_total", **other) == 1
            and value(found, "polyrex_tenant_tokens_total", tenant="default", kind="generation")
            == 18
        )

    eventually(counted)


def test_errors_are_counted_by_code_tenant_and_task(serve: Serve, make_router: MakeRouter) -> None:
    served = serve(FakeEngine(failure=RuntimeError("of the engine")))
    register(served.client, "plural", make_router(0))
    assert served.complete(task="plural", max_tokens=4).status_code == 500
    assert served.complete(task="plural", max_tokens=4, stream=True).status_code == 200
    assert served.complete(task="unheard-of").status_code == 404

    def counted() -> bool:
        found = read(served.client)
        task = {"tenant": "default", "task": "plural"}
        return (
            value(found, "polyrex_task_errors_total", **task) == 2
            and value(found, "polyrex_tenant_errors_total", tenant="default") == 3
            and value(found, "polyrex_errors_total", code="internal_error") == 2
            and value(found, "polyrex_errors_total", code="task_not_found") == 1
            and value(
                found, "vllm:request_success_total", model_name="base", engine="0",
                finished_reason="error",
            ) == 2
        )  # fmt: skip

    eventually(counted)


def test_a_client_that_goes_away_is_an_abort(serve: Serve) -> None:
    served = serve(FakeEngine(hang=True))
    with served.client.stream(
        "POST", "/v1/completions", json={"prompt": "x", "stream": True}
    ) as answer:
        next(answer.iter_lines())
    labels = {"model_name": "base", "engine": "0", "finished_reason": "abort"}
    eventually(lambda: value(read(served.client), "vllm:request_success_total", **labels) == 1)


def test_names_that_nobody_registered_are_no_labels(served: Served) -> None:
    for number in range(20):
        served.complete(task=f"made-up-{number}")
        served.complete(model=f"made-up-{number}")
        served.client.get(f"/v1/tasks/made-up-{number}")
        served.client.get("/livez", headers={"x-request-id": f"made-up-{number}"})
    assert "made-up" not in served.client.get("/metrics").text


def test_only_keys_for_metrics_show_the_names_of_tenants(serve: Serve) -> None:
    operator = bearer(OPERATOR_KEY)
    client = serve(api_key_digests=OPERATOR_DIGESTS).client
    client.headers.update(operator)
    make_tenant(client, "acme")
    acme = {role: bearer(make_key(client, "acme", role)) for role in ("inference", "task-admin")}
    metrics = bearer(make_key(client, "default", "metrics"))
    for _ in range(3):
        body = {"prompt": "x", "max_tokens": 1}
        assert client.post("/v1/completions", json=body, headers=acme["inference"]).is_success
    for headers in (*acme.values(), {"authorization": "Bearer no-such-key"}):
        refused = client.get("/metrics", headers=headers)
        assert (refused.status_code in (401, 403), "vllm" in refused.text) == (True, False)
    eventually(
        lambda: (
            value(read(client, **metrics), "polyrex_tenant_requests_total", tenant="acme")
            is not None
        )
    )


class Traffic:
    """A server's usage, and what /metrics showed of it before."""

    def __init__(self) -> None:
        self.usage = Usage()
        self.before: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}

    def add(self, tenant: str, task: str) -> None:
        record = RequestRecord(state={"principal": Principal(tenant)}, prompt_tokens=2)
        record.task = TaskLike(task, tenant)  # type: ignore[assignment]
        self.usage.add(record)

    def scrape(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """The figures now; none may have gone, or become less."""
        now = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.usage.collect()
            for sample in family.samples
        }
        for key, figure in self.before.items():
            assert now[key] >= figure, key
        self.before = now
        return now


class TaskLike:
    version = 1

    def __init__(self, name: str, tenant: str) -> None:
        self.name = name
        self.tenant = tenant


@contextmanager
def no_gap(traffic: Traffic, requests: int) -> Iterator[None]:
    """Whatever happens to labels, all series together count every request once."""
    yield
    for kind in ("tenant", "task"):
        counted = sum(
            v
            for (name, _), v in traffic.scrape().items()
            if name == f"polyrex_{kind}_requests_total"
        )
        assert counted == requests


def test_series_are_bounded_and_never_go_backwards() -> None:
    traffic = Traffic()
    with no_gap(traffic, 30_000):
        for number in range(30_000):
            # Every thousand requests other tasks and tenants are the busy ones.
            epoch, low = divmod(number, 1000)
            traffic.add(f"tenant-{epoch}-{low % 10}", f"task-{epoch}-{low % 5}")
            if number % 500 == 0:
                traffic.scrape()
    found = traffic.scrape()
    tenants = {dict(labels)["tenant"] for name, labels in found if "tenant_requests" in name}
    tasks = {
        (dict(labels)["tenant"], dict(labels)["task"])
        for name, labels in found
        if "task_requests" in name
    }
    assert len(tenants) == MOST_TENANTS + 1  # and the others
    assert len(tasks) == MOST_TASKS + 1


class PassedOn(FewNames[tuple[str, ...]]):
    """Gives the place of whoever came first to whoever comes next: the planted defect."""

    def uses(self, name: tuple[str, ...]) -> bool:
        if len(self._given) == self._most and name not in self._given:
            self._given.pop()
        return super().uses(name)


def test_a_place_that_passes_on_would_be_seen() -> None:
    traffic = Traffic()
    tasks = traffic.usage._tasks
    tasks.few = PassedOn(2)
    add, counts = tasks.add, tasks._counts

    def add_and_forget(labels: tuple[str, ...], request: RequestRecord) -> None:
        add(labels, request)
        for gone in counts.keys() - tasks.few._given - {tasks._other}:
            del counts[gone]

    tasks.add = add_and_forget  # type: ignore[method-assign]

    def use_five_tasks() -> None:
        for number in range(100):
            traffic.add("acme", f"task-{number % 5}")
            traffic.scrape()

    with pytest.raises(KeyError):
        use_five_tasks()


def test_a_task_named_like_the_rest_is_not_taken_for_it() -> None:
    traffic = Traffic()
    traffic.add("other", "other")
    labels = {key for name, key in traffic.scrape() if name == "polyrex_task_requests_total"}
    assert labels == {frozenset({("tenant", "other"), ("task", "other")})}
