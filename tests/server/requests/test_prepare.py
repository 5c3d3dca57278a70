"""Prompts are encoded within a budget, and off the event loop where they are large."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.files.inventory import Inventory
from polyrex.server.errors import InvalidRequest
from polyrex.server.registry.database import Database
from polyrex.server.registry.principal import OPERATOR
from polyrex.server.registry.registry import TaskRegistry
from polyrex.server.requests.bodies import ChatCompletionRequest, CompletionRequest
from polyrex.server.requests.database_calls import DatabaseCalls
from polyrex.server.requests.prepare import PreparedRequest, RequestPreparer
from polyrex.server.requests.text import Tokenizer
from support.fake_server import FakeEngine

CONTEXT = 256
LONG = "word " * 1000


class Watched(Tokenizer):
    """A tokenizer that notes in which threads it encodes what, and can be held."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        self.encoded: list[tuple[str, int]] = []
        self.begun, self.may_go_on = threading.Event(), threading.Event()
        self.may_go_on.set()
        self.held_from = 0  # characters

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        self.encoded.append((text, threading.get_ident()))
        self.begun.set()
        if len(text) >= self.held_from:
            self.may_go_on.wait(30)
        return super().encode(text, special=special)


@pytest.fixture
def watched(tokenizer: PreTrainedTokenizerBase) -> Watched:
    return Watched(tokenizer)


@pytest.fixture
def preparer(
    tmp_path: Path, random_inventory: Inventory, watched: Watched
) -> Iterator[RequestPreparer]:
    """A preparer of requests to an engine whose context holds 256 tokens."""
    registry = TaskRegistry(Database(f"sqlite:///{tmp_path / 'registry.db'}"), random_inventory)
    reads, engine = DatabaseCalls(8), FakeEngine(context_length=CONTEXT)
    preparer = RequestPreparer("base", registry, reads, watched, engine, None)
    yield preparer
    preparer.close()
    reads.close()
    registry.close()


def chat(text: str, **fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate(
        {"messages": [{"role": "user", "content": text}], **fields}
    )


def completion(prompt: Any, **fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": prompt, **fields})


def prepare(
    preparer: RequestPreparer, body: CompletionRequest | ChatCompletionRequest
) -> Coroutine[Any, Any, PreparedRequest]:
    if isinstance(body, ChatCompletionRequest):
        return preparer.chat(body, OPERATOR)
    return preparer.completion(body, OPERATOR)


@pytest.mark.parametrize("make", [completion, chat])
@pytest.mark.parametrize(("repeats", "apart"), [(1, False), (200, True)])
def test_a_large_prompt_is_encoded_off_the_event_loop(
    preparer: RequestPreparer,
    watched: Watched,
    make: Callable[..., Any],
    repeats: int,
    apart: bool,
) -> None:
    asyncio.run(prepare(preparer, make("word " * repeats, max_tokens=1)))
    assert [thread != threading.get_ident() for _, thread in watched.encoded] == [apart]


@pytest.mark.parametrize("make", [completion, chat])
def test_a_prompt_that_is_far_too_long_is_not_encoded(
    preparer: RequestPreparer, watched: Watched, make: Callable[..., Any]
) -> None:
    with pytest.raises(InvalidRequest, match=r"has more than 255 tokens.*context holds 256"):
        asyncio.run(prepare(preparer, make("word " * 100_000, max_tokens=1)))
    assert watched.encoded == []


@pytest.mark.parametrize("make", [completion, chat])
@pytest.mark.parametrize("max_tokens", [256, 2**31 - 1])
def test_a_completion_longer_than_the_context_costs_no_encoding(
    preparer: RequestPreparer, watched: Watched, make: Callable[..., Any], max_tokens: int
) -> None:
    with pytest.raises(InvalidRequest, match="context holds 256") as refused:
        asyncio.run(prepare(preparer, make("word", max_tokens=max_tokens)))
    assert refused.value.param == "max_tokens"
    assert watched.encoded == []


def test_a_prompt_may_fill_the_context(preparer: RequestPreparer) -> None:
    prepared = asyncio.run(prepare(preparer, completion([5] * 255, max_tokens=1)))
    assert prepared.prompt_tokens == 255
    with pytest.raises(InvalidRequest, match="prompt has 256 tokens and asks for 1 more"):
        asyncio.run(prepare(preparer, completion([5] * 256, max_tokens=1)))


def test_a_client_that_leaves_takes_its_further_prompts_along(
    preparer: RequestPreparer, watched: Watched
) -> None:
    watched.may_go_on.clear()
    prompts = [f"{number} " * 300 for number in range(4)]

    async def leave() -> None:
        asking = asyncio.create_task(prepare(preparer, completion(prompts)))
        await asyncio.to_thread(watched.begun.wait, 30)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        watched.may_go_on.set()

    asyncio.run(leave())
    preparer.close()
    assert [text for text, _ in watched.encoded] == prompts[:1]


def test_a_request_with_many_prompts_lets_others_pass(
    preparer: RequestPreparer, watched: Watched
) -> None:
    watched.may_go_on.clear()
    greedy = [
        completion([f"number {number} internationalization " * 20] * 8, max_tokens=1)
        for number in range(2)
    ]
    late_text = "late internationalization " * 24
    late = completion(late_text, max_tokens=1)

    async def ask() -> None:
        asking = [asyncio.create_task(prepare(preparer, body)) for body in greedy]
        await asyncio.to_thread(watched.begun.wait, 30)
        asking.append(asyncio.create_task(prepare(preparer, late)))
        await asyncio.sleep(0)  # and it waits in line
        watched.may_go_on.set()
        await asyncio.gather(*asking)

    asyncio.run(ask())
    order = [text for text, _ in watched.encoded]
    assert order.index(late_text) <= 4


def test_prompts_that_probably_do_not_fit_make_no_other_wait(
    preparer: RequestPreparer, watched: Watched
) -> None:
    watched.held_from = 20_000
    watched.may_go_on.clear()
    # One word, of which it cannot be known how many tokens it has without encoding it.
    oversized = [completion("ab" * 10_000, max_tokens=1) for _ in range(3)]

    async def ask() -> list[PreparedRequest | BaseException]:
        asking = [asyncio.create_task(prepare(preparer, body)) for body in oversized]
        await asyncio.to_thread(watched.begun.wait, 30)
        ordinary = await asyncio.wait_for(prepare(preparer, completion("word " * 200)), 30)
        watched.may_go_on.set()
        return [ordinary, *await asyncio.gather(*asking, return_exceptions=True)]

    ordinary, *refused = asyncio.run(ask())
    assert isinstance(ordinary, PreparedRequest)
    assert [type(one) for one in refused] == [InvalidRequest] * 3
