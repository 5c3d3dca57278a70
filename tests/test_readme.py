"""README and docs say what is there."""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest

from bench.vllm.plot_throughput import CHART, FIGURES, bars
from polyrex.adapters.methods.registry import METHODS
from polyrex.server.cli.main import COMMANDS, GROUPS
from polyrex.server.http.access import ACCESS
from support.command_line import polyrex
from support.pages import PAGES, ROOT, code

README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"
OTHERS = [ROOT / each for each in ("ARCHITECTURE.md", "CHANGELOG.md", "ROADMAP.md")]
GENERATED = ("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json")
"""Routes that FastAPI makes of the others."""
FOLDERS = "adapters|kernels|server|training|tests|docs|examples"


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name)


def test_readme_invites() -> None:
    assert len(README.splitlines()) <= 120
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert pictures == ["docs/images/how-it-works.svg", "docs/images/throughput.svg"]


def test_every_method_has_a_row() -> None:
    page = (DOCS / "concepts.md").read_text()
    rows = {
        found for line in page.splitlines() for found in re.findall(r"^\| `([a-z0-9-]+)`", line)
    }
    assert rows == set(METHODS)


@every_page
def test_every_file_it_names_is_there(page: Path) -> None:
    named = re.findall(rf"`((?:{FOLDERS})/[\w./*-]*)`", page.read_text())
    assert [each for each in named if not list(ROOT.glob(each))] == []


def test_files_are_named() -> None:
    named = [each for page in PAGES for each in re.findall(rf"`(?:{FOLDERS})/", page.read_text())]
    assert len(named) > 50


@every_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, heading = link.partition("#")
        if path.startswith("https:"):
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link


def headings(page: Path) -> set[str]:
    """The anchors that a code host gives a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_in_the_index() -> None:
    for folder in (DOCS, DOCS / "decisions"):
        index = (folder / "README.md").read_text()
        missing = [page.name for page in folder.glob("*.md") if f"({page.name})" not in index]
        assert missing in ([], ["README.md"])


def shown_commands(page: Path) -> list[tuple[str, str]]:
    """The commands that lines of code begin with, each with its arguments."""
    lines = re.sub(r"\\\n", " ", code(page))
    found = re.findall(
        r"^(?:\$ |torchrun .* )?polyrex (?:--config \S+ )?([a-z][a-z-]*)(.*)", lines, re.MULTILINE
    )
    return [(command, arguments.partition(" #")[0]) for command, arguments in found]


def test_every_command_is_shown() -> None:
    assert {command for page in PAGES for command, _ in shown_commands(page)} == set(COMMANDS)


@every_page
def test_every_command_it_shows_is_there(page: Path) -> None:
    assert [command for command, _ in shown_commands(page) if command not in COMMANDS] == []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", code(page))) <= targets


@every_page
def test_every_flag_it_shows_is_there(page: Path) -> None:
    for command, arguments in shown_commands(page):
        words = arguments.split()
        path = [command, *(words[:1] if command in GROUPS else [])]
        there = {flag for depth in range(len(path)) for flag in flags(*path[: depth + 1])}
        shown = {word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)}
        assert shown <= there, f"polyrex {' '.join(path)}"


@cache
def flags(*command: str) -> frozenset[str]:
    """The flags that a command's `--help` lists."""
    found = re.findall(r"--[a-z][a-z.-]*", polyrex(*command, "--help").stdout)
    return frozenset(["--help", *found])


def test_every_route_is_on_the_page_of_the_api() -> None:
    page = (DOCS / "api.md").read_text()
    routes = [f"`{method} {path}`" for method, path in ACCESS if path not in GENERATED]
    assert len(routes) > 30
    assert [route for route in routes if route not in page] == []


def test_measured_figures_are_those_of_the_benchmark() -> None:
    page = (DOCS / "benchmarks.md").read_text()
    ratios = json.loads((ROOT / "tests" / "results" / "bench.json").read_text())["ratios"]
    shown = dict(re.findall(r"^\| [^|]+ \| `([a-z0-9_]+)` \| ([\d.]+)", page, re.MULTILINE))
    assert {each: float(value) for each, value in shown.items()} == ratios


def test_the_chart_shows_what_was_measured() -> None:
    drawn = CHART.read_text()
    rows = bars(json.loads(FIGURES.read_text()))
    assert len(rows) == 4
    for row in rows:
        assert f">{row.name}<" in drawn
        assert f">{row.beside}<" in drawn
        assert row.beside == "1" or row.beside.split(",")[0] in README


@cache
def strings() -> tuple[str, ...]:
    """Every string in the product's code; of formatted ones, the parts that are fixed."""
    files = [path for folder in FOLDERS.split("|")[:4] for path in (ROOT / folder).rglob("*.py")]
    nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text())))
    return tuple(
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def test_messages_that_are_explained_are_those_of_the_code() -> None:
    page = (DOCS / "troubleshooting.md").read_text()
    cells = re.findall(r"^\| (`[^|]+`[^|]*) \|", page, re.MULTILINE)
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 30
    parts = [part.strip(" ?") for message in messages for part in message.split("…")]
    missing = [part for part in parts if not any(part in string for string in strings())]
    assert missing == []
