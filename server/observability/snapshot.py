"""The figures of /metrics that are read when it is asked for, so that no copy is kept in step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from polyrex.adapters.errors import PolyrexError
from polyrex.server.admission.gate import Readiness
from polyrex.server.engines.base import Engine, EngineStats
from polyrex.server.registry.registry import TaskRegistry

from .completions import ENGINE
from .usage import Usage

_REFUSALS = ("share", "wait", "full", "old", "shed", "deadline")
_MOST_ADAPTERS = "1000000"
"""Room for adapters as gateways count it: here every task is as quick to serve as any other."""


class Places(Protocol):
    """Who may have a place in the engine: what admission knows of it."""

    @property
    def in_flight(self) -> int:
        """Completions that wait or have a place."""
        ...

    @property
    def refusals(self) -> Mapping[str, int]:
        """Requests that got no place, by reason."""
        ...

    def waiting(self) -> Mapping[str, tuple[int, float]]:
        """Completions that wait, and their estimated tokens, by tenant."""
        ...


class Snapshot(Collector):
    """Reads engine, registry and places at scrape time."""

    def __init__(
        self,
        model: str,
        engine: Engine,
        tasks: TaskRegistry,
        places: Places,
        readiness: Readiness,
        usage: Usage,
    ) -> None:
        """`model` is the base model's id; `usage` knows which tenants have series of their own."""
        self._labels = (model, ENGINE)
        self._engine = engine
        self._tasks = tasks
        self._places = places
        self._readiness = readiness
        self._usage = usage
        self._begun = time.time()

    def describe(self) -> Iterable[Metric]:
        return ()  # the engine may not be running yet

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        waiting = self._places.waiting()
        yield from self._of_vllm(stats, sum(completions for completions, _ in waiting.values()))
        yield from self._for_gateways(stats)
        yield from self._of_places(waiting)
        yield from self._of_engine(stats)
        yield from self._of_registry()

    def _of_vllm(self, stats: EngineStats, waiting: int) -> Iterator[Metric]:
        # Who chooses a replica by what waits must see all of it: here little waits in the engine.
        labels = ("model_name", "engine")
        gauges: tuple[tuple[str, str, float], ...] = (
            ("num_requests_running", "Completions being generated", stats.running),
            ("num_requests_waiting", "Completions waiting", waiting + stats.waiting),
            ("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1", stats.kv_cache_usage),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=labels)
            gauge.add_metric(self._labels, value)
            yield gauge
        totals = (
            ("prompt_tokens", "Prompt tokens processed", stats.prompt_tokens),
            ("generation_tokens", "Tokens generated", stats.generated_tokens),
            ("prefix_cache_queries", "Prompt tokens looked up", stats.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found cached", stats.prefix_hits),
            ("num_preemptions", "Completions put back to wait", stats.preemptions),
        )
        for name, text, value in totals:
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=labels)
            counter.add_metric(self._labels, value)
            yield counter

    def _for_gateways(self, stats: EngineStats) -> Iterator[Metric]:
        """What load balancers of the Gateway API select a replica by.

        Every replica serves every task equally well: the same adapters everywhere, none of them
        loaded, and room for more, so that affinity to adapters favours none. The value is a time,
        by which gateways find the newest series of vLLM's many.
        """
        adapters = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters as gateways count them: always room",
            labels=("max_lora", "waiting_lora_adapters", "running_lora_adapters"),
        )
        adapters.add_metric((_MOST_ADAPTERS, "", ""), self._begun)
        yield adapters
        cache = GaugeMetricFamily(
            "vllm:cache_config_info",
            "Size of the KV cache: tokens a block, and blocks",
            labels=("block_size", "num_gpu_blocks", "engine"),
        )
        if stats.kv_blocks:  # else the engine is not up yet
            cache.add_metric((str(stats.kv_block_size), str(stats.kv_blocks), ENGINE), 1)
        yield cache

    def _of_places(self, waiting: Mapping[str, tuple[int, float]]) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "polyrex_in_flight", "Completions that wait or have a place", self._places.in_flight
        )
        shown: dict[str, Counter[str]] = {}
        for tenant, (completions, tokens) in waiting.items():
            queued = {"completions": completions, "tokens": tokens}
            shown.setdefault(self._usage.shown(tenant), Counter()).update(queued)
        for what, text in (
            ("completions", "Completions that wait for a place"),
            ("tokens", "Tokens, by estimate, of completions that wait for a place"),
        ):
            gauge = GaugeMetricFamily(f"polyrex_queue_{what}", text, labels=["tenant"])
            for label, queue in shown.items():
                gauge.add_metric([label], queue[what])
            yield gauge
        refusals = CounterMetricFamily(
            "polyrex_refusals", "Requests that got no place, by reason", labels=["reason"]
        )
        for reason in _REFUSALS:
            refusals.add_metric([reason], self._places.refusals.get(reason, 0))
        yield refusals

    def _of_engine(self, stats: EngineStats) -> Iterator[Metric]:
        yield GaugeMetricFamily("polyrex_ready", "1 while /readyz says ready", self._ready())
        yield GaugeMetricFamily(
            "polyrex_slots_used", "Rows of the routing table in use", stats.slots_used
        )
        yield CounterMetricFamily("polyrex_engine_steps", "Forward passes", stats.steps)
        yield CounterMetricFamily(
            "polyrex_engine_restarts", "Restarts of a failed engine", stats.restarts
        )
        paths = CounterMetricFamily(
            "polyrex_adapter_steps", "Forward passes with adapters, by path", labels=["path"]
        )
        for path, count in stats.adapter_steps.items():
            paths.add_metric([path], count)
        yield paths

    def _ready(self) -> bool:
        try:
            self._readiness.check()
            self._engine.check()
        except PolyrexError:
            return False
        return True

    def _of_registry(self) -> Iterator[Metric]:
        tasks = self._tasks
        degraded = not tasks.database.health.ok
        gauges: tuple[tuple[str, str, float], ...] = (
            ("tasks", "Registered tasks", len(tasks)),
            ("tasks_rejected", "Task files rejected at start", len(tasks.rejected)),
            ("registry_revision", "Revision of the registry known here", tasks.revision),
            (
                "registry_degraded",
                "1 while the registry's database fails or cannot be followed",
                degraded,
            ),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(f"polyrex_{name}", text, value)
        canaries = CounterMetricFamily(
            "polyrex_canary_requests",
            "Requests to tasks that have a canary, by which version answered",
            labels=["version"],
        )
        for version, count in tasks.canary_counts.totals().items():
            canaries.add_metric([version], count)
        yield canaries
