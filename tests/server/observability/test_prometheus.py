"""Dashboard and alerts against Debian's Prometheus, which scrapes a real server under load."""

from __future__ import annotations

import math
import shutil
import subprocess
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.files.inventory import Inventory
from polyrex.server.engines.base import EngineStats, GenerationRequest, TokenChunk
from support.fake_server import FakeEngine, serving
from support.observability.load import Load
from support.observability.prometheus import (
    ALERTS,
    NOT_INSTALLED,
    Prometheus,
    Query,
    alert_queries,
    installed,
    panel_queries,
    scraping,
)
from support.random_inventory import MakeRouter
from support.tenants.identities import make_key, make_tenant

pytestmark = pytest.mark.skipif(not installed(), reason=NOT_INSTALLED)

HERE = Path(__file__).parent
WINDOW = "20s"
"""In which a rate needs two scrapes."""
QUERIES = [*panel_queries(WINDOW), *alert_queries()]


class Busy(FakeEngine):
    """An engine that counts what it does, and fails on one completion in ten."""

    def stats(self) -> EngineStats:
        done = len(self.requests)
        return replace(super().stats(), prefix_queries=2 * done, prefix_hits=done)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        if len(self.requests) % 10 == 9:
            self.requests.append(request)
            raise RuntimeError("now and then")
        async for chunk in super().generate(request):
            yield chunk


@pytest.fixture(scope="module")
def prometheus(
    random_inventory: Inventory,
    tokenizer: PreTrainedTokenizerBase,
    make_router: MakeRouter,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Prometheus]:
    """Prometheus beside a server that has been, and is, under load."""
    folder = tmp_path_factory.mktemp("prometheus")
    with serving(folder, random_inventory, tokenizer, Busy()) as served:
        for number in range(4):
            served.client.put(
                f"/v1/tasks/task-{number}",
                content=make_router(number),
                headers={"content-type": "application/octet-stream"},
            ).raise_for_status()
        make_tenant(served.client, "limited", requests_per_minute=1)
        keys = ("none", make_key(served.client, "limited", "inference"))
        load = Load(served.url, keys, ["task-0", "task-1", "task-2", "task-3"])
        with scraping(served.url, folder, 0.5) as running, load.running():
            yield running


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.place)
def test_what_is_drawn_and_watched_is_there(prometheus: Prometheus, query: Query) -> None:
    deadline = time.monotonic() + 60
    figures: list[float] = []
    while not figures and time.monotonic() < deadline:
        figures = [
            value
            for series in prometheus.query(query.expression)
            for _, value in series.values
            if not math.isnan(value)
        ]
        time.sleep(0 if figures else 0.2)
    assert figures, query.expression
    assert all(math.isfinite(figure) and figure >= 0 for figure in figures)


def test_a_name_that_is_not_exposed_would_be_seen(prometheus: Prometheus) -> None:
    assert prometheus.query("sum(rate(vllm:no_such_metric_total[20s]))") == []


def promtool(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["promtool", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def test_rules_are_valid() -> None:
    done = promtool("check", "rules", ALERTS.name, folder=ALERTS.parent)
    assert done.returncode == 0, done.stdout + done.stderr


def rules_test(folder: Path, rules: str) -> subprocess.CompletedProcess[str]:
    """Run the tests of the rules, with this text as the rules."""
    (folder / "alerts.yml").write_text(rules)
    shutil.copy(HERE / "alerts_test.yml", folder)
    return promtool("test", "rules", "alerts_test.yml", folder=folder)


def test_every_alert_fires_on_what_it_is_for_and_not_on_a_healthy_server(tmp_path: Path) -> None:
    done = rules_test(tmp_path, ALERTS.read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    names = {
        rule["alert"]
        for group in yaml.safe_load(ALERTS.read_text())["groups"]
        for rule in group["rules"]
    }
    tested = (HERE / "alerts_test.yml").read_text()
    assert {name for name in names if f'alertname="{name}"' not in tested} == set()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("> 0.01", "> 0.05"),
        ("polyrex_ready == 0", "polyrex_ready == 1"),
        ("vllm:kv_cache_usage_perc > 0.95", "vllm:kv_cache_usage_perc > 0.5"),
        ("_restarts_total[15m]", "_restart_total[15m]"),
    ],
)
def test_a_wrong_alert_would_be_seen(tmp_path: Path, right: str, wrong: str) -> None:
    rules = ALERTS.read_text()
    assert right in rules
    assert rules_test(tmp_path, rules.replace(right, wrong)).returncode != 0
