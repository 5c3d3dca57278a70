"""What the end of a test run says of tests that did not run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.observability import prometheus
from support.storage.postgres import NOT_INSTALLED

TESTS = Path(__file__).parent
OTEL = "OpenTelemetry is not installed (pip install 'polyrex[otel]')"
RAY = "Ray is not installed (pip install 'polyrex[ray]')"
MISSING = {
    "support/storage/postgres.py": NOT_INSTALLED,
    "support/observability/prometheus.py": prometheus.NOT_INSTALLED,
    "server/observability/test_tracing.py": OTEL,
    "server/registry/test_storage_faults.py": "gcc is not installed",
    "server/test_ray_app.py": RAY,
    "server/test_ray_settings.py": RAY,
}
"""Why tests are skipped where something is missing, by the file that says so."""


class Terminal:
    """The reporter at the end of a run that skipped tests for these reasons."""

    def __init__(self, reasons: Sequence[str]) -> None:
        skipped = [SimpleNamespace(longrepr=("file", 1, f"Skipped: {each}")) for each in reasons]
        self.stats = {"skipped": skipped} if skipped else {}
        self.lines: list[tuple[str, bool]] = []

    def write_line(self, line: str, *, red: bool) -> None:
        self.lines.append((line, red))


def summary(config: pytest.Config, reasons: Sequence[str]) -> list[tuple[str, bool]]:
    """The lines that tests/conftest.py writes, and whether they are red."""
    terminal = Terminal(reasons)
    conftest: Any = config.pluginmanager.get_plugin(str(TESTS / "conftest.py"))
    conftest.pytest_terminal_summary(terminal)
    return terminal.lines


@pytest.mark.parametrize("file", MISSING)
def test_what_is_missing_is_said_in_red(pytestconfig: pytest.Config, file: str) -> None:
    reason = MISSING[file]
    assert reason in (TESTS / file).read_text()
    (line,) = summary(pytestconfig, [reason, "has a card", reason])
    assert line == (f"2 tests, or files of tests, did not run: {reason}", True)


def test_every_missing_thing_has_a_line_of_its_own(pytestconfig: pytest.Config) -> None:
    lines = summary(pytestconfig, list(MISSING.values()))
    assert [text.partition(": ")[2] for text, _ in lines] == list(dict.fromkeys(MISSING.values()))


def test_nothing_is_said_where_nothing_is_missing(pytestconfig: pytest.Config) -> None:
    assert summary(pytestconfig, []) == summary(pytestconfig, ["has a card"]) == []
