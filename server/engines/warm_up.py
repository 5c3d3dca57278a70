"""Warm-up requests, so that the first request of a client is as fast as later ones."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import torch

from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.files.task import TaskVersion

from .base import Engine, GenerationRequest, SamplingParams

_ROUNDS = ((4, 16, 2), (1, 16, 2))  # requests, prompt tokens, new tokens


async def warm_up(engine: Engine, inventory: Inventory) -> None:
    """Run a few batches of several sizes, of a task and then of the base model."""
    for task in (_neutral_task(inventory), None):
        for requests, prompt, new in _ROUNDS:
            sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
            request = GenerationRequest("warm-up", tuple(range(prompt)), sampling, task)
            await asyncio.gather(*(_run(engine, request) for _ in range(requests)))


async def _run(engine: Engine, request: GenerationRequest) -> None:
    async with aclosing(engine.generate(request)) as chunks:
        async for _ in chunks:
            pass


def _neutral_task(inventory: Inventory) -> TaskVersion:
    """A task, in no registry, that gives all experts the same routing weight."""
    return TaskVersion.unregistered(inventory, "warm-up", torch.zeros(inventory.routing_shape))
