"""Debian's Prometheus, scraping one server over loopback; and the queries of docs/observability."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import yaml

from support.reliability.ports import reserved_port

NOT_INSTALLED = "Prometheus is not installed (Debian: apt-get install prometheus)"

ROOT = Path(__file__).parents[3]
DASHBOARD = ROOT / "docs" / "observability" / "dashboard.json"
ALERTS = ROOT / "docs" / "observability" / "alerts.yml"
_THRESHOLD = re.compile(r"\s(==|>|<)\s*[\d.]+\s*$")


def installed() -> bool:
    """Whether the server and its tool are there."""
    return all(map(shutil.which, ("prometheus", "promtool")))


class Series(NamedTuple):
    """The labels of a series, and its values by time (unix time, in seconds)."""

    labels: Mapping[str, str]
    values: list[tuple[float, float]]


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    client: httpx.Client

    def query(self, expression: str) -> list[Series]:
        """What an expression gives now; raises HTTPStatusError where it does not parse."""
        found = self._ask("/api/v1/query", query=expression)
        return [Series(each["metric"], [_pair(each["value"])]) for each in found]

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[Series]:
        """What it gave from `start` to `end`, every `step` seconds."""
        found = self._ask(
            "/api/v1/query_range", query=expression, start=str(start), end=str(end), step=str(step)
        )
        return [Series(each["metric"], [_pair(p) for p in each["values"]]) for each in found]

    def _ask(self, path: str, **parameters: str) -> list[dict[str, Any]]:
        answer = self.client.get(path, params=parameters)
        answer.raise_for_status()
        found: list[dict[str, Any]] = answer.json()["data"]["result"]
        return found


def _pair(pair: list[Any]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])


@contextmanager
def scraping(url: str, folder: Path, seconds: float) -> Iterator[Prometheus]:
    """Scrape a server, as the job `polyrex`, every so many seconds while the context lasts."""
    every = f"{round(seconds * 1000)}ms"
    job = {
        "job_name": "polyrex",
        "scrape_interval": every,
        "scrape_timeout": every,
        "static_configs": [{"targets": [urlsplit(url).netloc]}],
    }
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump({"scrape_configs": [job]}))
    with reserved_port() as port:
        command = [
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=error",
        ]
        with (folder / "prometheus.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        address = f"http://127.0.0.1:{port}"
        try:
            with httpx.Client(base_url=address, timeout=10, trust_env=False) as client:
                _wait(client, process, folder)
                yield Prometheus(client)
        finally:
            process.terminate()
            process.wait()


def _wait(client: httpx.Client, process: subprocess.Popen[bytes], folder: Path) -> None:
    while True:
        assert process.poll() is None, (folder / "prometheus.log").read_text()
        try:
            if client.get("/-/ready").is_success:
                return
        except httpx.TransportError:
            pass  # it is not listening yet


class Query(NamedTuple):
    """An expression that docs/observability shows, and where."""

    place: str
    expression: str
    legend: str = ""


def panels() -> list[dict[str, Any]]:
    """The panels of the dashboard."""
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def filled(expression: str, window: str) -> str:
    """An expression as Grafana sends it for all servers, with its rates over `window`."""
    return expression.replace("$instance", ".*").replace("$__rate_interval", window)


def panel_queries(window: str) -> list[Query]:
    """Every query of the dashboard."""
    return [
        Query(panel["title"], filled(target["expr"], window), target["legendFormat"])
        for panel in panels()
        for target in panel["targets"]
    ]


def alert_queries() -> list[Query]:
    """Every alert's expression without its threshold."""
    rules = [
        rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
    ]
    return [Query(rule["alert"], _THRESHOLD.sub("", rule["expr"])) for rule in rules]
