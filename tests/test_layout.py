"""The shape of the code: sizes of files and functions, and who may import whom."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "adapters", "server", "training")
CODE = sorted(path for folder in (*FOLDERS, "tests") for path in (ROOT / folder).rglob("*.py"))

MOST_LINES_A_FILE = 400
MOST_LINES_A_FUNCTION = 80
MEDIAN_LINES_A_FUNCTION = 12
MOST_FILES_A_FOLDER = 12

MAY_IMPORT = {
    "kernels": {"kernels"},
    "adapters": {"adapters", "kernels"},
    # kernels: the routing table, whose rows the embedded engine fills
    "server": {"server", "adapters", "kernels"},
    "training": {"training", "adapters", "kernels"},
}
"""The folders that each folder may import. The command line (server/cli/main.py) names training's
commands in a table of strings, and imports them on demand: both share one program."""

OWNERS = {
    "fastapi": "server/",
    "pydantic": "server/",
    "starlette": "server/",
    "uvicorn": "server/",
    "opentelemetry": "server/observability/",
    "vllm": "server/engines/vllm/",
    "triton": "kernels/gpu/",
}
"""Packages that only the files under a path may import."""


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """The absolute names of everything that a file imports, wherever it does so."""
    here = ("polyrex", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            # `from polyrex import server` imports a folder too
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", CODE, ids=relative)
def test_files_and_functions_are_short(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= MOST_LINES_A_FILE
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MOST_LINES_A_FUNCTION, node.name


def test_most_functions_are_very_short() -> None:
    lengths = [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert statistics.median(lengths) <= MEDIAN_LINES_A_FUNCTION


def test_a_folder_holds_few_files() -> None:
    counts = Counter(relative(path.parent) for path in CODE)
    assert {name: n for name, n in counts.items() if n > MOST_FILES_A_FOLDER} == {}


@pytest.mark.parametrize("folder", FOLDERS)
def test_rooms_do_not_import_in_circles(folder: str) -> None:
    """A room is a sub-folder, with all below it, or a file that lies in the folder itself."""
    graph: dict[str, set[str]] = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        room = path.relative_to(ROOT / folder).parts[0].removesuffix(".py")
        found = (name.split(".") for name in imports(path))
        graph.setdefault(room, set()).update(
            parts[2] for parts in found if parts[:2] == ["polyrex", folder] and len(parts) > 2
        )
        graph[room].discard(room)
    circle: list[str] = []
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = error.args[1]
    assert circle == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_in_one_direction(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name in imports(path):
            package, _, rest = name.partition(".")
            if package == "polyrex":
                assert rest.split(".")[0] in MAY_IMPORT[folder], f"{relative(path)}: {name}"


@pytest.mark.parametrize("package", OWNERS)
def test_a_package_is_imported_by_its_owner_alone(package: str) -> None:
    for path in CODE:
        if relative(path).startswith(("tests/", OWNERS[package])):
            continue
        assert package not in {name.partition(".")[0] for name in imports(path)}, relative(path)


@pytest.mark.parametrize("module", ["errors", "engines.base"])
def test_engines_and_their_errors_need_no_http_library(module: str) -> None:
    script = f"import sys, polyrex.server.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert not {b"fastapi", b"starlette"} & set(done.stdout.split())


def test_requests_and_engines_know_nothing_of_http() -> None:
    for room in ("requests", "engines"):
        for path in sorted((ROOT / "server" / room).rglob("*.py")):
            found = [name for name in imports(path) if name.startswith("polyrex.server.http")]
            assert not found, relative(path)


@pytest.mark.parametrize("folder", FOLDERS)
def test_top_folders_are_no_packages_of_their_own(folder: str) -> None:
    # `kernels` and `adapters` are on PyPI too, and transformers probes for `kernels` at import.
    assert not (ROOT / folder / "__init__.py").exists()
    assert (ROOT / folder / "py.typed").exists()


def test_no_file_is_named_for_nothing_in_particular() -> None:
    vague = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert not [relative(path) for path in CODE if path.stem in vague]


@pytest.mark.parametrize("name", ["Makefile", "Dockerfile", "pyproject.toml"])
def test_modules_that_a_file_names_are_there(name: str) -> None:
    named = set(re.findall(r"\bpolyrex(?:\.[a-z_0-9]+)+", (ROOT / name).read_text()))
    missing = [
        module
        for module in sorted(named)
        if not (path := ROOT.joinpath(*module.split(".")[1:])).is_dir()
        and not path.with_suffix(".py").exists()
    ]
    assert named
    assert missing == []
