"""What README and docs show is run, for real, or says why it is not.

A block of a shell, of Python, TOML or JSON has a comment above it:

    <!-- test: run -->        it is run in a folder that looks like the repository's
    <!-- test: server -->     likewise, beside a server whose address replaces the default one
    <!-- not run: REASON -->

The blocks of a page run in order, in one folder. In a console block, lines that begin with `$ ` are
commands, and what follows them is compared with what they print; `...` stands for anything. A TOML
or JSON block is parsed, and written to the file that its first line names (`# polyrex.toml`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from support.pages import PAGES, ROOT, Block, blocks

ADDRESS = "http://127.0.0.1:8000"
BIN = Path(sys.executable).parent


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def needs_server(page: Path) -> bool:
    return any(block.mark == "test: server" for block in blocks(page))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_that_can_be_typed_is_marked(page: Path) -> None:
    unmarked = [block.where for block in blocks(page) if block.needs_mark and not block.mark]
    assert unmarked == [], (
        "needs <!-- test: run -->, <!-- test: server --> or <!-- not run: why -->"
    )


@pytest.mark.parametrize(
    "page",
    [
        # `make check` leaves out what needs a server.
        pytest.param(page, id=name(page), marks=[pytest.mark.real_model] * needs_server(page))
        for page in PAGES
        if any(block.is_run for block in blocks(page))
    ],
)
def test_what_a_page_shows_works(
    page: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = checkout(tmp_path)
    for block in blocks(page):
        if block.mark == "test: server":
            run(block, folder, str(request.getfixturevalue("shipped_server_url")))
        elif block.is_run:
            run(block, folder, ADDRESS)


def test_marks_are_read(tmp_path: Path) -> None:
    written = tmp_path / "page.md"
    written.write_text(
        "```sh\nls\n```\n<!-- test: run -->\n```sh\nls\n```\n```sh\nls\n```\n"
        "<!-- not run: takes hours -->\n\n```console\n$ ls\n```\n"
        "<!-- not run: no -->\n```\n$ ls\n```\n"
        "```text\nls\n```\n"
    )
    found = [(block.needs_mark, block.mark[:8]) for block in blocks(written)]
    assert found == [
        (True, ""), (True, "test: ru"), (True, ""), (True, "not run:"), (True, ""), (False, ""),
    ]  # fmt: skip


def test_outputs_that_differ_are_seen() -> None:
    assert matches("a ... c\nd", "a b c\nd\n")
    assert matches("a   \n", "a\n")
    assert not matches("a ... c", "a b d")
    assert not matches("a", "a\nb")


def checkout(folder: Path) -> Path:
    """A folder with the repository's files, to which commands may write."""
    here = folder / "polyrex"
    here.mkdir()
    for path in ROOT.iterdir():
        if not path.name.startswith("."):
            (here / path.name).symlink_to(path)
    return here


def run(block: Block, folder: Path, server: str) -> None:
    """Run or parse a block; its commands must succeed and print what it shows."""
    text = block.text.replace(ADDRESS, server)
    if block.language in ("toml", "json"):
        tomllib.loads(text) if block.language == "toml" else json.loads(text)
        named = re.match(r"# ([\w.-]+)\n", text)
        if named:
            (folder / named[1]).write_text(text)
    elif block.language == "console":
        for command, expected in commands(text):
            printed = shell(block, command, folder)
            assert matches(expected, printed), f"{block.where}: {command}\n{printed}"
    elif block.language == "python":
        (folder / "block.py").write_text(text)
        shell(block, "python block.py", folder)
    else:
        shell(block, text, folder)


def shell(block: Block, command: str, folder: Path) -> str:
    """What a command prints; it must succeed."""
    environment = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "XDG_STATE_HOME": str(folder / "state"),
        "COLUMNS": "200",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{block.where}: {command}\n{done.stdout}{done.stderr}"
    return done.stdout


def commands(text: str) -> list[tuple[str, str]]:
    """The commands of a console block, each with the output below it."""
    found: list[tuple[str, str]] = []
    continued = False
    for line in text.splitlines(keepends=True):
        if line.startswith("$ "):
            found.append((line[2:], ""))
        elif continued:
            found[-1] = (found[-1][0] + line, "")
        else:
            found[-1] = (found[-1][0], found[-1][1] + line)
        continued = (line.startswith("$ ") or continued) and line.endswith("\\\n")
    return found


def matches(expected: str, printed: str) -> bool:
    """Whether an output is the expected one, in which `...` stands for anything."""
    wanted, found = (
        "\n".join(line.rstrip() for line in text.strip().splitlines())
        for text in (expected, printed)
    )
    pattern = ".*".join(re.escape(part) for part in wanted.split("..."))
    return re.fullmatch(pattern, found, re.DOTALL) is not None
