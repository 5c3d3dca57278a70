"""Traces of requests: with an exporter in memory, and to a real collector over HTTP."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.files.inventory import Inventory
from polyrex.server.errors import StartError
from polyrex.server.observability.tracing import traces_from
from support.fake_server import FakeEngine, Serve, Served, serving
from support.observability.waiting import eventually
from support.random_inventory import MakeRouter

pytest.importorskip(
    "opentelemetry.sdk", reason="OpenTelemetry is not installed (pip install 'polyrex[otel]')"
)

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
)
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import (
    InMemorySpanExporter,
)
from opentelemetry.trace import SpanKind, StatusCode

from polyrex.server.observability.otel import OtelTraces

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@dataclass
class Traced:
    """A server whose traces are kept in memory."""

    served: Served
    traces: OtelTraces
    exporter: InMemorySpanExporter

    def spans(self) -> dict[str, ReadableSpan]:
        """What has been exported, by name."""
        assert self.traces._provider.force_flush()
        return {span.name: span for span in self.exporter.get_finished_spans()}

    def span(self, name: str) -> ReadableSpan:
        """A span, which is exported a moment after its request's answer."""
        eventually(lambda: name in self.spans())
        return self.spans()[name]


def traced(serve: Serve, engine: FakeEngine | None = None) -> Traced:
    exporter = InMemorySpanExporter()
    traces = OtelTraces(exporter)
    return Traced(serve(engine, traces=traces), traces, exporter)


def attributes(span: ReadableSpan, *left_out: str) -> dict[str, Any]:
    return {name: v for name, v in (span.attributes or {}).items() if name not in left_out}


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


def span_id(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.span_id)


HTTP = "POST /v1/completions"


def test_a_trace_leads_from_http_to_the_engine(serve: Serve, make_router: MakeRouter) -> None:
    found = traced(serve)
    client = found.served.client
    client.put(
        "/v1/tasks/plural",
        content=make_router(0),
        headers={"content-type": "application/octet-stream"},
    ).raise_for_status()
    answer = client.post(
        "/v1/completions",
        json={"prompt": ["x", "y"], "task": "plural", "max_tokens": 3, "temperature": 0},
        headers={"x-request-id": "mine", "traceparent": PARENT},
    )
    http, engine = found.span(HTTP), found.span("text_completion plural")
    assert (http.kind, http.status.status_code) == (SpanKind.SERVER, StatusCode.UNSET)
    assert http.context is not None
    assert f"{http.context.trace_id:032x}" == PARENT.split("-")[1]
    assert parent_of(http) == int(PARENT.split("-")[2], 16)
    assert attributes(http) == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "polyrex.request_id": "mine",
        "polyrex.registry.revision": 1,
        "polyrex.tenant": "default",
        "polyrex.task": "plural",
        "polyrex.version": 1,
    }
    assert parent_of(engine) == span_id(http)
    assert attributes(engine) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "plural",
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.response.id": answer.json()["id"],
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.output_tokens": 6,
    }
    ended: list[dict[str, Any]] = [dict(event.attributes or {}) for event in engine.events]
    assert sorted(each["index"] for each in ended) == [0, 1]
    about = ended[0]
    assert (about["finish_reason"], about["generated_tokens"], about["engine_steps"]) == (
        "length", 3, 3,
    )  # fmt: skip
    assert 0 < about["seconds_to_first_token"] < 60
    assert (http.start_time or 0) <= (engine.start_time or 0) <= (engine.end_time or 0)


def test_waiting_for_a_place_is_a_span(serve: Serve) -> None:
    found = traced(serve)
    found.served.complete(max_tokens=1)
    assert parent_of(found.span("queue")) == span_id(found.span(HTTP))


def test_a_request_without_a_parent_begins_a_trace(serve: Serve) -> None:
    found = traced(serve)
    for odd in ({}, {"traceparent": "odd"}, {"traceparent": "x" * 8000}):
        found.served.client.get("/v1/models", headers=odd)
    eventually(lambda: "GET /v1/models" in found.spans())
    spans = [s for s in found.exporter.get_finished_spans() if s.name == "GET /v1/models"]
    assert {parent_of(span) for span in spans} == {None}


def test_failures_are_errors_of_their_spans_and_a_clients_mistakes_are_not(serve: Serve) -> None:
    found = traced(serve, FakeEngine(failure=RuntimeError("of the engine")))
    found.served.complete(max_tokens=9, stream=True)
    http, engine = found.span(HTTP), found.span("text_completion base")
    assert (http.status.status_code, engine.status.status_code) == (StatusCode.ERROR,) * 2
    assert attributes(http)["error.type"] == "internal_error"
    assert attributes(engine)["error.type"] == "RuntimeError"
    found.exporter.clear()
    found.served.complete(prompt=5)
    assert found.span(HTTP).status.status_code is StatusCode.UNSET


@dataclass
class Collector:
    """An OTLP collector over HTTP on loopback."""

    url: str
    bodies: list[bytes] = field(default_factory=list)

    def names(self) -> set[str]:
        """The names of the spans that came, each of our own service."""
        found = set()
        for body in self.bodies:
            for each in ExportTraceServiceRequest.FromString(body).resource_spans:
                service = {a.key: a.value.string_value for a in each.resource.attributes}
                assert service["service.name"] == "polyrex"
                found |= {span.name for scope in each.scope_spans for span in scope.spans}
        return found


@pytest.fixture
def collector() -> Iterator[Collector]:
    class Receive(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if self.path == "/v1/traces":
                made.bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Receive) as server:
        made = Collector(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield made
        server.shutdown()
        thread.join()


def test_traces_reach_the_collector_that_the_environment_names(
    random_inventory: Inventory,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    with serving(tmp_path, random_inventory, tokenizer, FakeEngine()) as served:
        served.complete(max_tokens=1)
    # A server that stops exports what is left.
    assert {HTTP, "text_completion base"} <= collector.names()


def test_a_collector_that_is_away_holds_up_nothing(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    served = serve()
    assert served.complete(max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    "environment",
    [{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, {"OTEL_SERVICE_NAME": "polyrex"}],
    ids=str,
)
def test_no_collector_no_traces(environment: dict[str, str]) -> None:
    assert traces_from(environment) is None


def test_exporters_that_are_not_there_are_named() -> None:
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    assert traces_from({**endpoint, "OTEL_TRACES_EXPORTER": "none"}) is None
    with pytest.raises(StartError, match=r"OTEL_EXPORTER_OTLP_PROTOCOL: .* http/protobuf alone"):
        traces_from({**endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})


def test_without_a_collector_opentelemetry_is_not_imported() -> None:
    program = (
        "import sys\n"
        "import polyrex.server.http.app\n"
        "from polyrex.server.observability.tracing import traces_from\n"
        "assert traces_from({}) is None\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
