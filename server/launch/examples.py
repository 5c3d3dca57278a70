"""The text that a server prints once it is ready: examples, and a command to paste."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Sequence
from typing import Any

from polyrex.adapters.errors import UnknownTask
from polyrex.adapters.files.examples import MAX_TOKENS, Example
from polyrex.server.config import ServerConfig
from polyrex.server.registry.principal import OPERATOR
from polyrex.server.registry.registry import TaskRegistry

_WIDTH = 100
_BASE = "base model"


def examples_text(config: ServerConfig, registry: TaskRegistry, examples: Sequence[Example]) -> str:
    """Describe the examples that hold for the registered tasks, and end with a curl of the first.

    Without any, the curl alone: a task's example prompt, without claiming an answer.
    """
    shown = [example for example in examples if _holds(example, registry)]
    if not shown:
        return _curl(config, _any_request(registry))
    first = {"task": shown[0].task, "prompt": shown[0].prompt}
    width = max(len(_BASE), *(len(example.task) for example in shown))
    described = [_description(example, width) for example in shown]
    return "\n\n".join([*described, _curl(config, first)])


def _holds(example: Example, registry: TaskRegistry) -> bool:
    """Whether the task is registered, with the very router that gave the example's answer."""
    try:
        found = registry.find(OPERATOR, example.task).current
    except UnknownTask:
        return False
    return found.router_sha256 == example.router_sha256


def _description(example: Example, width: int) -> str:
    question = example.prompt.removesuffix("\nAnswer:").replace("\n", " / ")
    return "\n".join(
        [
            textwrap.shorten(question, _WIDTH, placeholder=" ..."),
            f"  {example.task:{width}}  {_one_line(example.answer)}",
            f"  {_BASE:{width}}  {_one_line(example.base_answer)}",
        ]
    )


def _one_line(answer: str) -> str:
    return textwrap.shorten(answer, _WIDTH - 20, placeholder=" ...")


def _any_request(registry: TaskRegistry) -> dict[str, str]:
    """The first task's example prompt, or a prompt for the base model."""
    for task in registry.page(OPERATOR).tasks:
        prompt = task.current.provenance.get("example_prompt")
        if isinstance(prompt, str) and task.current.inventory_sha256 == registry.inventory.sha256:
            return {"task": task.name, "prompt": prompt}
    return {"prompt": "The capital of France is"}


def _curl(config: ServerConfig, request: dict[str, str]) -> str:
    """A command line that sends a completion request."""
    body: dict[str, Any] = {**request, "max_tokens": MAX_TOKENS, "temperature": 0}
    host = f"[{config.host}]" if ":" in config.host else config.host
    address = f"http://{host}:{config.port}/v1/completions"
    words = ["curl", address, "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    command = shlex.join(words)
    # In double quotes: the shell fills in the key.
    return f'{command} -H "Authorization: Bearer $KEY"' if config.api_key_digests else command
