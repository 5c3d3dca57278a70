"""The metrics of /metrics. Names shared with vLLM mean the same; others begin with polyrex_.

Nothing is labelled by task: ten thousand tasks would be ten thousand time series.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from polyrex.server.engines.base import Engine
from polyrex.server.registry.registry import TaskRegistry

from polyrex.server.admission.gate import Gate

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class _Snapshot(Collector):
    """Reads engine, registry and gate at scrape time, so that no copy has to be kept in step."""

    def __init__(self, engine: Engine, tasks: TaskRegistry, gate: Gate) -> None:
        self._engine = engine
        self._tasks = tasks
        self._gate = gate

    def describe(self) -> Iterable[Metric]:
        return ()  # the engine may not be running yet

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        gauges: tuple[tuple[str, str, float], ...] = (
            ("vllm:num_requests_running", "Completions being generated", stats.running),
            ("vllm:num_requests_waiting", "Completions waiting in the engine", stats.waiting),
            ("vllm:kv_cache_usage_perc", "Share of the KV cache in use", stats.kv_cache_usage),
            ("polyrex_in_flight", "Completions admitted and not finished", self._gate.in_flight),
            ("polyrex_slots_used", "Rows of the routing table in use", stats.slots_used),
        )
        gauges += self._of_registry()
        for name, text, value in gauges:
            yield GaugeMetricFamily(name, text, value)
        totals = (
            ("vllm:prompt_tokens", "Prompt tokens processed", stats.prompt_tokens),
            ("vllm:generation_tokens", "Tokens generated", stats.generated_tokens),
            ("polyrex_engine_steps", "Forward passes", stats.steps),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up", stats.prefix_queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found cached", stats.prefix_hits),
        )
        for name, text, value in totals:
            yield CounterMetricFamily(name, text, value)
        paths = CounterMetricFamily(
            "polyrex_adapter_steps", "Forward passes with adapters, by path", labels=["path"]
        )
        for path, count in stats.adapter_steps.items():
            paths.add_metric([path], count)
        yield paths
        canaries = CounterMetricFamily(
            "polyrex_canary_requests",
            "Requests to tasks that have a canary, by which version answered",
            labels=["version"],
        )
        for version, count in self._tasks.canary_counts.totals().items():
            canaries.add_metric([version], count)
        yield canaries

    def _of_registry(self) -> tuple[tuple[str, str, float], ...]:
        tasks = self._tasks
        degraded = not tasks.database.health.ok
        return (
            ("polyrex_tasks", "Registered tasks", len(tasks)),
            ("polyrex_tasks_rejected", "Task files rejected at start", len(tasks.rejected)),
            ("polyrex_registry_revision", "Revision of the registry known here", tasks.revision),
            (
                "polyrex_registry_degraded",
                "1 while the registry's database fails or cannot be followed",
                degraded,
            ),
        )


class Metrics:
    """The metrics of one application, in a Prometheus registry of their own."""

    def __init__(self, engine: Engine, tasks: TaskRegistry, gate: Gate) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Snapshot(engine, tasks, gate))
        self.http_requests = Counter(
            "polyrex_http_requests",
            "HTTP requests answered",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self.first_token = Histogram(
            "vllm:time_to_first_token_seconds",
            "From admission to a completion's first token",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.latency = Histogram(
            "vllm:e2e_request_latency_seconds",
            "From admission to the end of a request",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.finished = Counter(
            "vllm:request_success",
            "Completions finished",
            ("finished_reason",),
            registry=self._registry,
        )

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
