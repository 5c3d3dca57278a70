"""Examples that come with an inventory: prompts that its tasks answer correctly.

`examples.json` beside the inventory is a list of objects with the fields of `Example`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from polyrex.adapters.errors import MalformedFile

from .tensor_file import write_atomic

EXAMPLES = "examples.json"
MAX_TOKENS = 16
"""The most tokens of an example's answers."""


@dataclass(frozen=True)
class Example:
    """A prompt, the right answer that a task's router gives, and the base model's own answer.

    Both answers are greedy, in float32, of at most MAX_TOKENS tokens, without white space at their
    ends. They are claimed for one version of the router alone.
    """

    task: str
    router_sha256: str
    prompt: str
    answer: str
    base_answer: str


def read_examples(inventory: Path) -> list[Example]:
    """The examples beside an inventory's file; none where there is no such file.

    Raises MalformedFile where the file is not what `write_examples` writes.
    """
    path = inventory.with_name(EXAMPLES)
    if not path.exists():
        return []
    try:
        return [Example(**entry) for entry in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise MalformedFile(f"{path}: not a list of examples: {error}") from error


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write examples to a file."""
    entries = [asdict(example) for example in examples]
    write_atomic(path, (json.dumps(entries, indent=2, ensure_ascii=False) + "\n").encode())
