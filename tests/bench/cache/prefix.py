"""`make bench-prefix`: what the prefix cache of the embedded engine saves, and what it costs.

Two engines run the base model and the shipped inventory in float32, one with the prefix cache and
one without, on the same prompts, for requests to one task:

- chat: four clients, one after another, with eight turns each; every prompt is the conversation so
  far, as text. The time to the first token of each turn after the first.
- one system prompt of 400 tokens before 32 different questions, one after another, and at once. The
  time to the first token of each client after the first.
- 32 prompts at once that share nothing, in a cache that holds few of them: tokens a second. Two
  turns in three are without the cache, so that equal contenders show how much is noise.

Prompts that come one after another go to both engines, one right after the other, in changing
order; prompts that come at once go to both in turns. Every round begins with an empty cache. A time
is compared with that of the same prompt in the same round. The last line is one JSON document.
"""

from __future__ import annotations

import asyncio
import os
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.engine_requests import answer, first_token, tokens_per_second
from bench.harness import Turns, command_line, machine, report, without
from bench.serving import running
from polyrex.adapters.files.bundle import Bundle
from polyrex.adapters.files.inventory import Inventory, load_experts, read_inventory
from polyrex.adapters.files.task import TaskVersion
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.adapters.model.base_model import DEFAULT_BASE, load_base, load_tokenizer, resolve_base
from polyrex.server.config import EmbeddedConfig
from polyrex.server.engines.embedded.engine import EmbeddedEngine
from polyrex.server.engines.threads import in_passing_thread
from polyrex.server.launch.loading import shipped_inventory
from polyrex.server.requests.text import Tokenizer

Prompt = tuple[int, ...]

CHAT_TURNS, ANSWER_TOKENS = 8, 24
SYSTEM_TOKENS, QUESTIONS = 400, 32
UNLIKE = 32, 64
"""Prompts, and tokens of each."""
NEW_TOKENS, BATCHES = 32, 2
HELD_TOKENS = UNLIKE[0] * (UNLIKE[1] + NEW_TOKENS) * 5 // 4
"""A batch fits, and what it leaves must go for the next one."""
WITH = EmbeddedConfig()
WITHOUT = replace(WITH, prefix_cache=False)
MOST_TIME = 0.35
"""The goal: time to the first token with the cache, over that without it."""

TOPICS = (
    "rivers and how they change their beds over the centuries",
    "the harvest of olives, and what becomes of them afterwards",
    "why bridges are built with gaps between their parts",
    "the letters that sailors wrote home from long voyages",
)
RULES = (
    "Answer in one sentence, name the source of every figure, and say plainly what is not known. ",
    "Prices are in euros, distances in kilometres, and times in the local time of the customer. ",
    "Whoever asks for a refund gets the form, and an answer from the office within three days. ",
    "Never promise a delivery before the warehouse has confirmed it, whatever the customer says. ",
)


@dataclass(frozen=True)
class Subject:
    """What is measured: the shipped inventory on its base model, the first of its tasks."""

    models: tuple[AdaptedModel, AdaptedModel]  # one for each engine
    inventory: Inventory
    task: TaskVersion
    tokenizer: Tokenizer


def load() -> Subject:
    """Load the model for both engines."""
    path = resolve_base(DEFAULT_BASE)
    bundle = Bundle(read_inventory(shipped_inventory(DEFAULT_BASE)))

    def model() -> AdaptedModel:
        return load_experts(bundle.inventory, load_base(path, torch.float32))

    models = in_passing_thread(lambda: (model(), model()))
    task = bundle.task(bundle.tasks[0])
    return Subject(models, bundle.inventory, task, Tokenizer(load_tokenizer(path)))


async def conversations(subject: Subject) -> list[list[Prompt]]:
    """The prompts of chats of eight turns, with the answers that the engine gives."""
    async with running(subject.models[0], subject.inventory, WITH) as engine:
        return [await _conversation(engine, subject, topic) for topic in TOPICS]


async def _conversation(engine: EmbeddedEngine, subject: Subject, topic: str) -> list[Prompt]:
    messages: list[dict[str, str]] = []
    prompts: list[Prompt] = []
    for turn in range(CHAT_TURNS):
        question = f"Question {turn + 1}: what should a beginner know about {topic}, and why?"
        messages.append({"role": "user", "content": question})
        prompts.append(encoded(subject, messages))
        found = await first_token(engine, prompts[-1], ANSWER_TOKENS, subject.task)
        text = subject.tokenizer.decode(found.tokens)
        messages.append({"role": "assistant", "content": text})
    return prompts


def questions(subject: Subject) -> list[Prompt]:
    """Different questions after one system prompt."""
    rules = subject.tokenizer.encode("".join(RULES * 8))[:SYSTEM_TOKENS]
    system = {"role": "system", "content": subject.tokenizer.decode(rules)}
    return [
        encoded(
            subject,
            [system, {"role": "user", "content": f"Where is parcel number {17 * number}?"}],
        )
        for number in range(QUESTIONS)
    ]


def encoded(subject: Subject, messages: list[dict[str, str]]) -> Prompt:
    """A chat in the model's own template."""
    text = subject.tokenizer.render_chat(messages)
    return tuple(subject.tokenizer.encode(text, special=False))


@dataclass(frozen=True)
class Engines:
    """Both engines, started, and the task that is asked; `salt` gives a round its own cache."""

    both: tuple[EmbeddedEngine, EmbeddedEngine]  # with the cache, without it
    task: TaskVersion
    number: int  # of the round
    salt: str

    async def seconds(self, engine: EmbeddedEngine, prompt: Prompt) -> float:
        """Seconds to the first token."""
        found = await first_token(engine, prompt, ANSWER_TOKENS, self.task, self.salt)
        return found.seconds

    def in_turn(self, number: int) -> Sequence[int]:
        """The engines in an order that changes from round to round, and from one to the next."""
        return (0, 1) if (self.number + number) % 2 else (1, 0)


Pairs = list[tuple[float, float]]
Times = Callable[[Engines, Sequence[Prompt]], Awaitable[Pairs]]


async def one_by_one(engines: Engines, prompts: Sequence[Prompt]) -> Pairs:
    """The times of each prompt but the first, sent one after another."""
    found: Pairs = []
    for number, prompt in enumerate(prompts):
        pair = [0.0, 0.0]
        for which in engines.in_turn(number):
            pair[which] = await engines.seconds(engines.both[which], prompt)
        found.append((pair[0], pair[1]))
    return found[1:]


async def at_once(engines: Engines, prompts: Sequence[Prompt]) -> Pairs:
    """The times of each prompt but the first, sent together."""
    found: list[list[float]] = [[], []]
    for which in engines.in_turn(0):
        seconds = (engines.seconds(engines.both[which], prompt) for prompt in prompts)
        found[which] = await asyncio.gather(*seconds)
    return list(zip(*found, strict=True))[1:]


async def compare(
    subject: Subject, times: Times, chats: Sequence[Sequence[Prompt]], rounds: int
) -> dict[str, Any]:
    """The times with the cache and without, and their ratios, over all clients and rounds."""
    found: Pairs = []
    async with (
        running(subject.models[0], subject.inventory, WITH) as cached,
        running(subject.models[1], subject.inventory, WITHOUT) as plain,
    ):
        for number in range(rounds):
            engines = Engines((cached, plain), subject.task, number, f"round {number}")
            for prompts in chats:
                found += await times(engines, prompts)
    ratios = statistics.quantiles(one / other for one, other in found)
    low, ratio, high = (round(each, 3) for each in ratios)
    return {
        "first_token_ms_with": round(1e3 * statistics.median(one for one, _ in found), 1),
        "first_token_ms_without": round(1e3 * statistics.median(other for _, other in found), 1),
        "with_over_without": ratio,
        "quartiles": (low, high),
        "passed": ratio <= MOST_TIME,
    }


async def unlike(subject: Subject, rounds: int) -> dict[str, Any]:
    """Tokens a second of prompts that share nothing, while blocks are given away all the time."""
    contenders = {"with": WITH, "without": WITHOUT, "without_again": WITHOUT}
    generator, turns = torch.Generator().manual_seed(0), Turns()
    for into in turns.rounds(rounds):
        for name, config in contenders.items():
            small = replace(config, kv_cache_tokens=HELD_TOKENS)
            async with running(subject.models[0], subject.inventory, small) as engine:
                rates = []
                for _ in range(BATCHES):
                    prompts = torch.randint(100, 40000, UNLIKE, generator=generator).tolist()
                    answers = (answer(engine, tuple(p), NEW_TOKENS, subject.task) for p in prompts)
                    rates.append(await tokens_per_second(answers, NEW_TOKENS))
            into.add(name, statistics.mean(rates))
    noise = turns.compare("without_again", "without")
    found = turns.compare("with", "without")
    return {
        "tokens_per_second": turns.medians(),
        "with_over_without": found.ratio,
        "quartiles": found.quartiles,
        "without_over_itself": noise.ratio,
        "noise": noise.quartiles,
        "passed": found.ratio >= noise.quartiles[0],
    }


async def figures(rounds: int) -> dict[str, Any]:
    """All comparisons; each is printed when it is there."""
    found: dict[str, Any] = {}

    def note(name: str, part: dict[str, Any]) -> None:
        found[name] = part
        print(f"{name}: {part}", flush=True)

    subject = load()
    same_system = [questions(subject)]
    note("chat", await compare(subject, one_by_one, await conversations(subject), rounds))
    note("system_prompt", await compare(subject, one_by_one, same_system, rounds))
    note("system_prompt_at_once", await compare(subject, at_once, same_system, rounds))
    note("unlike_prompts", await unlike(subject, rounds + 2))
    return found


def main() -> None:
    """The command behind `make bench-prefix`."""
    options = command_line(__doc__, rounds=3).parse_args()
    before = os.getloadavg()[0]
    found = asyncio.run(figures(options.rounds))
    document = {
        "ratios": {name: part["with_over_without"] for name, part in found.items()},
        "passed": all(part["passed"] for part in found.values()),
        "most_time": MOST_TIME,
        "figures": found,
        "rounds": options.rounds,
        "load_before": round(before, 2),
        "machine": machine(),
    }
    report(document, options.out, without(document, "figures"))


if __name__ == "__main__":
    main()
