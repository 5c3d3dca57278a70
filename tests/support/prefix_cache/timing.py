"""Whether the time to a first token tells a tenant what another has asked."""

from __future__ import annotations

import time
from contextlib import aclosing
from dataclasses import dataclass, replace

import torch
from scipy.stats import ks_2samp

from polyrex.adapters.files.task import TaskVersion
from polyrex.server.engines.base import Engine, GenerationRequest
from support.engine_calls import GREEDY
from support.prefix_cache.isolation import Salt
from support.small_model import VOCABULARY


@dataclass(frozen=True)
class Timing:
    """How likely times are to differ as much by chance: Kolmogorov and Smirnov's test.

    Each compares times with those of prompts that nobody has asked before.
    """

    rounds: int
    across: float  # prompts that another tenant has asked; large, if they tell nothing
    within: float  # prompts that the same tenant has asked; small, or the test sees nothing


async def compare_times(
    engine: Engine, task: TaskVersion | None, salt: Salt, *, rounds: int, length: int = 200
) -> Timing:
    """Time prompts of `length` tokens; the engine is used by nobody else meanwhile."""
    generator = torch.Generator().manual_seed(0)
    router = "" if task is None else task.info.router_sha256
    victim, attacker = salt("victim", router, ""), salt("attacker", router, "")
    across, unknown, within = list[float](), list[float](), list[float]()

    async def seconds(prompt: list[int], salt: str) -> float:
        request = GenerationRequest(
            "timed", tuple(prompt), replace(GREEDY, max_tokens=1), task, salt
        )
        started = time.perf_counter()
        async with aclosing(engine.generate(request)) as chunks:
            await anext(chunks)
            taken = time.perf_counter() - started
            async for _ in chunks:
                pass
        return taken

    for number in range(rounds):
        asked, other = torch.randint(VOCABULARY, (2, length), generator=generator).tolist()
        await seconds(asked, victim)
        # By turns, so that neither always comes after the victim.
        for known in (True, False) if number % 2 else (False, True):
            into, prompt = (across, asked) if known else (unknown, other)
            into.append(await seconds(prompt, attacker))
        within.append(await seconds(asked, victim))
    return Timing(
        rounds,
        # "exact" warns where it cannot be, and goes on like this
        float(ks_2samp(across, unknown, method="asymp").pvalue),
        float(ks_2samp(within, unknown, method="asymp").pvalue),
    )
