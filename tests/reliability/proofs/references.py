"""Routers with the answers that transformers gives with them, without a server or an engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polyrex.adapters.files.inventory import load_experts
from polyrex.adapters.files.task import TaskVersion
from polyrex.adapters.model.base_model import load_base, load_tokenizer
from support.engine_calls import PlainModel
from support.random_inventory import random_router
from support.reliability.small_base import SmallBase

PROMPT = [101, 7, 33, 250, 18, 64, 311, 5, 90, 402, 77, 13, 260, 31, 8, 199, 55, 21]
"""More than a block of the cache, so that the start of it can be known from another request."""
TOKENS = 12

_MARGIN = 0.02
"""How much better the best token must be than the second, so that rounding cannot change it."""


@dataclass(frozen=True)
class Reference:
    """A router and its greedy answer to PROMPT."""

    router: bytes
    text: str


def references(small: SmallBase, count: int) -> list[Reference]:
    """So many routers whose answers all differ, from the first half of their tokens on."""
    inventory = small.read_inventory()
    adapted = load_experts(inventory, load_base(str(small.base), torch.float32))
    plain = PlainModel(adapted, inventory)
    tokenizer = load_tokenizer(str(small.base))
    found: dict[tuple[int, ...], Reference] = {}
    seed = 0
    while len(found) < count:
        router = random_router(inventory, seed, "reference")
        tokens = _greedy(plain, TaskVersion.from_bytes("reference", router, inventory))
        half = tokens[: TOKENS // 2]
        if tokens and half not in found:
            text: str = tokenizer.backend_tokenizer.decode(list(tokens))
            found[half] = Reference(router, text)
        seed += 1
    return list(found.values())


def _greedy(plain: PlainModel, task: TaskVersion) -> tuple[int, ...]:
    """The answer; nothing where one of its tokens is a close call."""
    tokens = tuple(PROMPT)
    for _ in range(TOKENS):
        values, indices = plain.logprobs(tokens, task)[-1].topk(2)
        if values[0] - values[1] < _MARGIN:
            return ()
        tokens += (int(indices[0]),)
    return tokens[len(PROMPT) :]
