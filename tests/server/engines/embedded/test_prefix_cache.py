"""With the prefix cache, requests get the answers that they get without it.

The slow twin is the same runner with the cache off: it computes every token of every prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.files.task import TaskVersion
from polyrex.adapters.spec import AdapterSpec
from polyrex.server.engines.embedded import prefix_cache
from polyrex.server.engines.embedded.generation import Generation
from polyrex.server.engines.embedded.paged_cache import PagedCache
from polyrex.server.engines.embedded.scheduler import Scheduler
from support.prefix_cache.stepping import GREEDY, Answer, Asked, Runner, differences, tokens
from support.random_inventory import make_inventory, make_task
from support.small_model import SPECS, spec_id


@pytest.fixture
def inventory(small_base: str, tmp_path: Path) -> Inventory:
    return inventory_of(AdapterSpec("tensorpoly-1", rank=3, experts=4), small_base, tmp_path)


def inventory_of(spec: AdapterSpec, base: str, folder: Path) -> Inventory:
    return make_inventory(folder / "inventory.safetensors", base, spec)


LENGTHS = (1, 15, 16, 17, 31, 32, 33, 40, 48, 50)
SHARED = (0, 1, 15, 16, 17, 33)


def conversation(task: TaskVersion | None) -> list[list[Asked]]:
    """Rounds of prompts of many lengths, which share some tokens with the first."""
    first = tokens(1, 50)
    alike = [Asked(first[:n] + tokens(100 + n, 40 - n), task) for n in SHARED]
    cut = [Asked(first[:length], task) for length in LENGTHS]
    return [[Asked(first, task)], alike, cut, alike + cut, [Asked(first, task)] * 4]


@pytest.mark.parametrize("pads_prompts", [False, True], ids=["each alone", "padded"])
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_every_method_answers_as_without_the_cache(
    spec: AdapterSpec, pads_prompts: bool, small_base: str, tmp_path: Path
) -> None:
    inventory = inventory_of(spec, small_base, tmp_path)
    with_cache = Runner(small_base, inventory)
    without = Runner(small_base, inventory, prefix_cache=False)
    with_cache.runner._cache.pads_prompts = pads_prompts
    for task in (None, make_task(inventory, 1)):
        for asked in conversation(task):
            expected = without.at_once(*asked)
            assert differences(with_cache.at_once(*asked), expected) == []
            assert {answer.cached for answer in expected} == {0}
    assert with_cache.runner.stats(0).prefix_hits > 1000


@pytest.mark.parametrize("length", LENGTHS)
def test_a_prompt_that_comes_again_is_cached_but_for_its_last_block(
    small_base: str, inventory: Inventory, length: int
) -> None:
    runner = Runner(small_base, inventory)
    first, again = runner.one(tokens(1, length)), runner.one(tokens(1, length))
    assert (first.cached, again.cached) == (0, (length - 1) // 16 * 16)


@pytest.mark.parametrize("shared", SHARED)
def test_prompts_share_the_whole_blocks_that_they_begin_with(
    small_base: str, inventory: Inventory, shared: int
) -> None:
    runner, first = Runner(small_base, inventory), tokens(1, 50)
    runner.one(first)
    assert runner.one(first[:shared] + tokens(2, 40)).cached == shared // 16 * 16


def test_the_next_turn_of_a_chat_finds_the_answer_in_the_cache(
    small_base: str, inventory: Inventory
) -> None:
    runner, without = (
        Runner(small_base, inventory, prefix_cache=cached) for cached in (True, False)
    )
    task, chat = make_task(inventory, 1), tokens(1, 30)
    for turn in range(4):
        answer = runner.one(chat, task)
        assert differences([answer], [without.one(chat, task)]) == []
        # Everything but the last tokens, of the last block and of the new turn, was there.
        assert answer.cached == (len(chat) - 12) // 16 * 16 if turn else answer.cached == 0
        chat += answer.ids + tokens(10 + turn, 11)


def chats(runner: Runner, task: TaskVersion) -> tuple[int, int]:
    """The tokens that the second turns of three chats find in the cache, and all that they have."""
    cached = asked = 0
    for number in range(3):
        chat = tokens(number, 90)
        chat += runner.one(chat, task).ids + tokens(10 + number, 14)
        cached += runner.one(chat, task).cached
        asked += len(chat)
    return cached, asked


def questions(runner: Runner, task: TaskVersion) -> tuple[int, int]:
    """The same of eight questions after one system prompt, all but the first."""
    prompts = [tokens(1, 200) + tokens(10 + number, 14) for number in range(8)]
    cached = [runner.one(prompt, task).cached for prompt in prompts]
    return sum(cached[1:]), sum(map(len, prompts[1:]))


@pytest.mark.parametrize("ask", [chats, questions])
def test_at_most_a_third_of_what_comes_again_is_computed_again(
    ask: Callable[[Runner, TaskVersion], tuple[int, int]],
    small_base: str,
    inventory: Inventory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The goal is a time of 0.35; tokens that are computed are what can be counted."""
    computed: list[int] = []
    right = Scheduler.schedule

    def counted(self: Scheduler) -> Any:
        spans = right(self)
        computed.append(sum(span.count for span in spans))
        return spans

    monkeypatch.setattr(Scheduler, "schedule", counted)
    task = make_task(inventory, 1)
    totals = []
    for on in (True, False):
        computed.clear()
        cached, asked = ask(Runner(small_base, inventory, prefix_cache=on), task)
        totals.append((cached, sum(computed)))
    (cached, with_cache), (never, without) = totals
    assert (never, without - with_cache) == (0, cached)  # what is said to be cached is saved
    assert cached > 0
    assert asked - cached <= 0.35 * asked


def test_requests_that_come_at_once_compute_their_prefix_once(
    small_base: str, inventory: Inventory
) -> None:
    runner, without = (
        Runner(small_base, inventory, prefix_cache=cached) for cached in (True, False)
    )
    asked = [Asked(tokens(1, 48) + tokens(10 + n, 5)) for n in range(8)]
    asked += [
        Asked(tokens(1, 50), sampling=replace(GREEDY, temperature=1.0, seed=n)) for n in (1, 2)
    ]
    found = runner.at_once(*asked)
    assert differences(found, without.at_once(*asked)) == []
    # The first step has room for 53 tokens of the first request, and for 11 of the second.
    assert [answer.cached for answer in found] == [0, 48 - 11, *[48] * 8]


def test_a_hit_repeats_to_the_last_bit(small_base: str, inventory: Inventory) -> None:
    runner, task = Runner(small_base, inventory), make_task(inventory, 1)
    prompt = tokens(1, 40)
    cold, *hits = (runner.one(prompt, task) for _ in range(4))
    other = runner.one(prompt, task, salt="another")
    assert [hit.cached for hit in hits] == [32] * 3
    assert hits[0].logprobs == hits[1].logprobs == hits[2].logprobs
    assert (other.cached, other.logprobs) == (0, cold.logprobs)


@pytest.mark.parametrize("blocks", [4, 5, 6, 9])
def test_a_full_cache_delays_requests_and_changes_nothing(
    small_base: str, inventory: Inventory, blocks: int
) -> None:
    """Requests go back to the queue, and find again what was not given away since."""
    sizes = {"kv_cache_tokens": 16 * blocks}
    runner = Runner(small_base, inventory, **sizes)
    without = Runner(small_base, inventory, **sizes, prefix_cache=False)
    long = replace(GREEDY, max_tokens=25)
    tasks = (None, make_task(inventory, 1))
    asked = [
        Asked(tokens(1, 17) + tokens(10 + n, 5 + n), task, sampling=long)
        for n in range(6)
        for task in tasks
    ]
    for _ in range(2):
        assert differences(runner.at_once(*asked), without.at_once(*asked)) == []
        assert runner.runner._cache.pool.usage == 0
    assert runner.runner.stats(0).prefix_hits > 0


def test_a_request_that_had_to_go_makes_its_blocks_known_again(
    small_base: str, inventory: Inventory
) -> None:
    """The older request takes all six blocks, and with them those that the younger had made."""
    runner = Runner(small_base, inventory, kv_cache_tokens=96)
    older = Asked(tokens(1, 33), sampling=replace(GREEDY, max_tokens=60))
    younger = Asked(tokens(2, 33), sampling=replace(GREEDY, max_tokens=30))
    assert [len(answer.ids) for answer in runner.at_once(older, younger)] == [60, 30]
    assert runner.one(tokens(2, 33)).cached == 32


def test_a_request_does_not_give_away_the_blocks_that_it_is_about_to_use(
    small_base: str, inventory: Inventory
) -> None:
    runner = Runner(small_base, inventory, kv_cache_tokens=96)
    without = Runner(small_base, inventory, prefix_cache=False)
    prompt = tokens(1, 49)
    runner.one(prompt)  # known: three of six blocks
    runner.one(tokens(2, 40))  # and two more, so that a third new block must come from these
    longer = prompt + tokens(3, 40)
    answer = runner.one(longer)
    assert answer.cached == 48
    assert differences([answer], [without.one(longer)]) == []


def test_a_prompt_that_is_left_halfway_is_not_known(small_base: str, inventory: Inventory) -> None:
    runner = Runner(small_base, inventory)
    expected = Runner(small_base, inventory, prefix_cache=False).one(tokens(1, 150))
    left = runner.begin(Asked(tokens(1, 150)))
    runner.steps(2)
    runner.runner.abort(left)
    assert (left.computed, runner.runner._cache.pool.usage) == (0, 0)
    answer = runner.one(tokens(1, 150))
    assert answer.cached == 0
    assert differences([answer], [expected]) == []


def test_what_an_aborted_request_has_computed_is_used(
    small_base: str, inventory: Inventory
) -> None:
    runner = Runner(small_base, inventory)
    expected = Runner(small_base, inventory, prefix_cache=False).one(tokens(1, 40))
    left = runner.begin(Asked(tokens(1, 40)))
    runner.steps(3)
    runner.runner.abort(left)
    answer = runner.one(tokens(1, 40))
    assert answer.cached == 32
    assert differences([answer], [expected]) == []


def after_a_failed_step(base: str, inventory: Inventory, monkeypatch: pytest.MonkeyPatch) -> Answer:
    """The answer to a prompt, part of whose blocks were never written by who had them before."""
    runner = Runner(base, inventory)
    failed = runner.begin(Asked(tokens(1, 100)))
    runner.steps(1)
    with monkeypatch.context() as broken:
        broken.delattr(PagedCache, "plan")
        runner.steps()
    assert isinstance(runner.answer(failed).error, Exception)
    return runner.one(tokens(1, 100))


def test_a_step_that_fails_leaves_no_known_block(
    small_base: str, inventory: Inventory, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Runner(small_base, inventory, prefix_cache=False).one(tokens(1, 100))
    answer = after_a_failed_step(small_base, inventory, monkeypatch)
    assert answer.cached == 0
    assert differences([answer], [expected]) == []


def test_a_task_whose_outputs_are_no_numbers_leaves_no_known_block(
    small_base: str, inventory: Inventory
) -> None:
    task = make_task(inventory, 1)
    nan = torch.full_like(task.router.weights, float("nan"))
    diverging = TaskVersion(
        replace(task.info, router_sha256="nan"), replace(task.router, weights=nan)
    )
    runner = Runner(small_base, inventory)
    for _ in range(2):
        generation = runner.begin(Asked(tokens(1, 40), diverging))
        runner.steps()
        assert isinstance(runner.answer(generation).error, Exception)
        assert generation.cached == 0


def test_all_of_a_prompt_is_computed_where_its_log_probabilities_are_asked_for(
    small_base: str, inventory: Inventory
) -> None:
    runner = Runner(small_base, inventory)
    scored = Asked(tokens(1, 40), sampling=replace(GREEDY, prompt_logprobs=1))
    expected = Runner(small_base, inventory, prefix_cache=False).at_once(scored)
    runner.one(tokens(1, 40))
    found = runner.at_once(scored)
    assert found[0].cached == 0
    assert len(found[0].logprobs) == 6 + 39
    assert differences(found, expected) == []


def test_without_the_setting_nothing_is_cached(small_base: str, inventory: Inventory) -> None:
    runner = Runner(small_base, inventory, prefix_cache=False)
    assert [runner.one(tokens(1, 40)).cached for _ in range(2)] == [0, 0]
    assert runner.runner.stats(0).prefix_queries == 0


def test_prompt_tokens_are_counted_once_in_the_statistics(
    small_base: str, inventory: Inventory
) -> None:
    runner = Runner(small_base, inventory)
    for _ in range(3):
        runner.one(tokens(1, 40))
    stats = runner.runner.stats(0)
    assert (stats.prefix_queries, stats.prefix_hits, stats.prompt_tokens) == (120, 64, 120)


# The same checks find these mistakes.


def test_a_key_without_the_block_before_it_is_noticed(
    small_base: str, inventory: Inventory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alone(generation: Generation, index: int) -> bytes:
        own = generation.tokens[16 * index : 16 * index + 16]
        return bytes(str((own, generation.request.cache_salt)), "ascii")

    x, w, y = tokens(1, 16), tokens(2, 16), tokens(3, 16)
    prompts = (x + y + x, w + x, w + y + x)  # of the last, both blocks are known, but not together
    without = Runner(small_base, inventory, prefix_cache=False)
    expected = [without.one(prompt) for prompt in prompts]
    runner = Runner(small_base, inventory)
    found = [runner.one(prompt) for prompt in prompts]
    assert [answer.cached for answer in found] == [0, 0, 16]
    assert differences(found, expected) == []
    monkeypatch.setattr(prefix_cache, "_key", alone)
    runner = Runner(small_base, inventory)
    found = [runner.one(prompt) for prompt in prompts]
    assert [answer.cached for answer in found] == [0, 0, 32]
    assert differences(found, expected) == [2]


def test_a_key_without_router_and_salt_is_noticed(
    small_base: str, inventory: Inventory, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, tasks = tokens(1, 40), [make_task(inventory, seed) for seed in (1, 2)]
    asked = [(task, salt) for task in (*tasks, None) for salt in ("a", "b", "")]
    without = Runner(small_base, inventory, prefix_cache=False)
    expected = [without.one(prompt, *one) for one in asked]
    runner = Runner(small_base, inventory)
    found = [runner.one(prompt, *one) for one in asked]
    assert [answer.cached for answer in found] == [0] * len(asked)
    assert differences(found, expected) == []
    monkeypatch.setattr(prefix_cache, "_first_key", lambda _request: b"")
    runner = Runner(small_base, inventory)
    found = [runner.one(prompt, *one) for one in asked]
    assert [answer.cached for answer in found[1:]] == [32] * (len(asked) - 1)
    assert differences(found, expected) == [3, 4, 5, 6, 7, 8]


def test_blocks_that_are_known_before_they_are_written_are_noticed(
    small_base: str, inventory: Inventory, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Scheduler.schedule

    def early(self: Scheduler) -> Any:
        spans = right(self)
        for span in spans:
            before, span.request.computed = (
                span.request.computed,
                span.request.computed + span.count,
            )
            self.share(span.request)
            span.request.computed = before
        return spans

    expected = Runner(small_base, inventory, prefix_cache=False).one(tokens(1, 100))
    monkeypatch.setattr(Scheduler, "schedule", early)
    answer = after_a_failed_step(small_base, inventory, monkeypatch)
    assert answer.cached == 96
    assert differences([answer], [expected]) == [0]
