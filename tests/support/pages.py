"""The pages that people read, and the fenced blocks in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
        *(ROOT / "docs").rglob("*.md"),
    ]
)

MARKED = frozenset({"sh", "bash", "shell", "console", "python", "toml", "json"})
"""Languages whose blocks say whether a test runs them."""

_FENCE = re.compile(r"^\s*```(\w*)\s*$")
_MARK = re.compile(r"^\s*<!-- (test: run|test: server|not run: (?P<reason>\S.{9,})) -->$")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `mark` is the comment above it, or empty."""

    page: Path
    line: int
    language: str
    mark: str
    text: str

    @property
    def where(self) -> str:
        """The block's place, as editors take it."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def needs_mark(self) -> bool:
        """Whether somebody may type what stands here."""
        return self.language in MARKED or self.text.startswith("$ ")

    @property
    def is_run(self) -> bool:
        """Whether a test runs it."""
        return self.mark.startswith("test: ")


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    before, opened, text = "", None, list[str]()
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        fence = _FENCE.match(line)
        if opened is not None and line.strip() == "```":
            start, language, mark = opened
            yield Block(page, start, language, mark, "".join(text))
            before, opened, text = "", None, []
        elif opened is not None:
            text.append(line + "\n")
        elif fence:
            mark = _MARK.match(before)
            opened = number, fence[1], mark[1] if mark else ""
        elif line.strip():
            before = line
    assert opened is None, f"{page}: a block is not closed"


def code(page: Path) -> str:
    """All that is set as code on a page: its blocks, and what stands between backticks."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", prose)
    return "\n".join([*spans, *(block.text for block in blocks(page))])
