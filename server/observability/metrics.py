"""The metrics of /metrics. Names shared with vLLM mean the same; others begin with polyrex_.

Ten thousand tasks would be ten thousand time series: few_names.py says which may have their own.
docs/observability.md lists all names.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from polyrex.server.admission.gate import Readiness
from polyrex.server.engines.base import Engine
from polyrex.server.registry.registry import TaskRegistry

from .completions import CompletionMetrics, CompletionTimes
from .requests import RequestRecord, current_request
from .snapshot import Places, Snapshot
from .usage import Usage

_LAG_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """The metrics of one application, in a Prometheus registry of their own."""

    def __init__(
        self, model: str, engine: Engine, tasks: TaskRegistry, places: Places, readiness: Readiness
    ) -> None:
        """`model` is the base model's id."""
        self._registry = registry = CollectorRegistry()
        self._usage = Usage()
        registry.register(Snapshot(model, engine, tasks, places, readiness, self._usage))
        registry.register(self._usage)
        self._completions = CompletionMetrics(model, registry)
        self.http_requests = Counter(
            "polyrex_http_requests",
            "HTTP requests answered",
            ("method", "route", "status"),
            registry=registry,
        )
        self.errors = Counter(
            "polyrex_errors", "Errors answered, by their code", ("code",), registry=registry
        )
        self.loop_lag = Histogram(
            "polyrex_loop_lag_seconds",
            "How late the event loop is",
            buckets=_LAG_SECONDS,
            registry=registry,
        )
        self.connections = Gauge("polyrex_connections", "Open connections", registry=registry)
        self.connections_closed = Counter(
            "polyrex_connections_closed",
            "Connections that the server closed, by reason",
            ("reason",),
            registry=registry,
        )

    def admitted(self, waited: float) -> None:
        """Record that the request under way got a place in the engine, after so many seconds."""
        self._completions.queue.observe(waited)
        trace = current_request().trace
        if trace is not None:
            trace.queued(waited)

    def completion(self, received: float, prompt_tokens: int) -> CompletionTimes:
        """Time a completion of a request that was received then (time.perf_counter)."""
        return CompletionTimes(self._completions, received, prompt_tokens)

    def finished(self, request: RequestRecord) -> None:
        """Count a request that is over by its tenant, its task and its error."""
        if request.error is not None:
            self.errors.labels(request.error).inc()
        self._usage.add(request)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
