"""Requests, tokens and errors of tenants, and of the tasks that are used most.

Only names that the registry knows come here: a request counts for a task once its version is found,
and for a tenant once its key is checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from .few_names import FewNames
from .requests import RequestRecord

MOST_TENANTS = 100
MOST_TASKS = 50
OTHER = "(other)"
"""Stands for all that have no series of their own; no tenant or task can have this name."""
BASE = "(base)"
"""Stands for the base model among the tasks; it belongs to no tenant."""

Labels = tuple[str, ...]


@dataclass
class _Counts:
    requests: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0

    def add(self, request: RequestRecord) -> None:
        self.requests += 1
        self.errors += request.error is not None
        self.prompt_tokens += request.prompt_tokens
        self.generated_tokens += request.generated_tokens


class _Series:
    """Counts by labels, of which few have series of their own."""

    def __init__(self, names: Sequence[str], most: int) -> None:
        self._names = list(names)
        self.few: FewNames[Labels] = FewNames(most)
        self._other = ("",) * (len(names) - 1) + (OTHER,)
        self._counts: dict[Labels, _Counts] = {}

    def add(self, labels: Labels, request: RequestRecord) -> None:
        shown = labels if self.few.uses(labels) else self._other
        self._counts.setdefault(shown, _Counts()).add(request)

    def families(self, kind: str) -> Iterator[Metric]:
        requests, errors, tokens = (
            CounterMetricFamily(f"polyrex_{kind}_{what}", text, labels=[*self._names, *more])
            for what, text, more in (
                ("requests", f"Requests by {kind}", []),
                ("errors", f"Requests that ended in an error, by {kind}", []),
                ("tokens", f"Tokens of prompts and completions, by {kind}", ["kind"]),
            )
        )
        for labels, counts in self._counts.items():
            requests.add_metric(labels, counts.requests)
            errors.add_metric(labels, counts.errors)
            tokens.add_metric([*labels, "prompt"], counts.prompt_tokens)
            tokens.add_metric([*labels, "generation"], counts.generated_tokens)
        yield from (requests, errors, tokens)


class Usage(Collector):
    """Counts finished requests by tenant and by task; for the event loop alone."""

    def __init__(self) -> None:
        self._tenants = _Series(["tenant"], MOST_TENANTS)
        self._tasks = _Series(["tenant", "task"], MOST_TASKS)

    def add(self, request: RequestRecord) -> None:
        """Count a request that is over."""
        if request.tenant is not None:
            self._tenants.add((request.tenant,), request)
        if request.prompt_tokens:  # it got as far as the engine
            task = request.task
            labels = ("", BASE) if task is None else (task.tenant, task.name)
            self._tasks.add(labels, request)

    def shown(self, tenant: str) -> str:
        """The tenant's label: its name, if it has a series of its own."""
        return tenant if (tenant,) in self._tenants.few else OTHER

    def describe(self) -> Iterable[Metric]:
        return ()  # nothing has been counted yet

    def collect(self) -> Iterator[Metric]:
        yield from self._tenants.families("tenant")
        yield from self._tasks.families("task")
