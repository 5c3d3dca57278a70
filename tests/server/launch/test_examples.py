"""The examples that a server prints once it is ready, and what they must not claim."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from polyrex.adapters.errors import MalformedFile
from polyrex.adapters.files.examples import Example, read_examples, write_examples
from polyrex.adapters.files.inventory import Inventory
from polyrex.server.config import ServerConfig
from polyrex.server.launch.examples import examples_text
from polyrex.server.registry.database import Database
from polyrex.server.registry.principal import OPERATOR
from polyrex.server.registry.registry import TaskRegistry

if TYPE_CHECKING:
    from support.random_inventory import MakeRouter

CONFIG = ServerConfig(model="base")


@pytest.fixture
def empty(tmp_path: Path, random_inventory: Inventory) -> Iterator[TaskRegistry]:
    database = Database(f"sqlite:///{tmp_path / 'tasks' / 'registry.db'}")
    with closing(TaskRegistry(database, random_inventory)) as registry:
        yield registry


@pytest.fixture
def registry(empty: TaskRegistry, make_router: MakeRouter) -> TaskRegistry:
    with_prompt = make_router(1, provenance={"example_prompt": "From provenance. Answer:"})
    empty.register(OPERATOR, "a", with_prompt)
    empty.register(OPERATOR, "plural", make_router(2))
    return empty


@pytest.fixture
def example(registry: TaskRegistry) -> Example:
    sha256 = registry.find(OPERATOR, "plural").current.router_sha256
    return Example("plural", sha256, "The plural?\nit's\nAnswer:", "these", "1.\n\n2.")


def body(command: str) -> dict[str, object]:
    """The JSON that a curl sends."""
    words = shlex.split(command)
    found: dict[str, object] = json.loads(words[words.index("-d") + 1])
    return found


def test_an_example_is_shown_beside_the_base_model(
    registry: TaskRegistry, example: Example
) -> None:
    *lines, empty, curl = examples_text(CONFIG, registry, [example]).split("\n")
    assert lines == ["The plural? / it's", "  plural      these", "  base model  1. 2."]
    assert empty == ""
    assert body(curl) == {
        "task": "plural",
        "prompt": example.prompt,
        "max_tokens": 16,
        "temperature": 0,
    }


def test_an_example_of_another_router_or_task_is_not_claimed(
    registry: TaskRegistry, example: Example, make_router: MakeRouter
) -> None:
    other = replace(example, task="nobody")
    registry.register(OPERATOR, "plural", make_router(3), replace=True)
    text = examples_text(CONFIG, registry, [other, example])
    assert text.startswith("curl")
    assert body(text) | {"task": "a", "prompt": "From provenance. Answer:"} == body(text)


def test_without_tasks_the_base_model_is_asked(empty: TaskRegistry) -> None:
    assert "task" not in body(examples_text(CONFIG, empty, []))


def test_the_command_asks_for_the_key_where_one_is_needed(registry: TaskRegistry) -> None:
    text = examples_text(replace(CONFIG, api_key_digests=(b"x",)), registry, [])
    assert text.endswith(' -H "Authorization: Bearer $KEY"')


def test_examples_are_read_as_they_were_written(tmp_path: Path, example: Example) -> None:
    inventory = tmp_path / "inventory.safetensors"
    assert read_examples(inventory) == []
    write_examples(tmp_path / "examples.json", [example])
    assert read_examples(inventory) == [example]


@pytest.mark.parametrize("content", ["no json", "5", '[{"task": "plural"}]', "[5]"])
def test_a_file_of_something_else_is_malformed(tmp_path: Path, content: str) -> None:
    (tmp_path / "examples.json").write_text(content)
    with pytest.raises(MalformedFile, match=r"examples\.json"):
        read_examples(tmp_path / "inventory.safetensors")
