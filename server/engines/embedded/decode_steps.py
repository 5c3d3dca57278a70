"""Decode steps whose inputs lie at fixed addresses, in few shapes: what a CUDA graph can hold.

A decode step computes one token of each of its requests. Its shape is a number of requests and a
number of cache blocks for each, both rounded up, and whether adapters are added. A shape is
recorded once: those of short requests at the engine's start, any other by the first step that has
it. cuda_graphs.py records on a GPU; anything that calls the recorded function again does as well,
and is how tests run this on a CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .batch import Batch
from .paged_cache import PagedCache
from .task_routing import TaskRouting

logger = logging.getLogger(__name__)

Replay = Callable[[], None]
Record = Callable[[Replay], Replay]
"""Takes a function of tensors that stay where they are, and returns what repeats its work."""

_FEWEST_BLOCKS = 4  # of a request; fewer shapes, for a little padding
_ANYHOW = 1024  # blocks of a step that are never too many, padding included
_MOST_PADDING = 4  # times the blocks that the requests hold


class Shape(NamedTuple):
    """The sizes of a recorded step."""

    requests: int
    blocks: int  # of each request
    adapters: bool


class DecodeSteps:
    """Runs decode steps of one model; only the engine's thread may."""

    def __init__(
        self,
        model: nn.Module,
        cache: PagedCache,
        routing: TaskRouting,
        requests: int,
        vocabulary: int,
        record: Record,
    ) -> None:
        """`requests` is the most of them that one step holds."""
        device, most = cache.storage.device, rounded(requests)
        size = 2 * most + max(_ANYHOW, _MOST_PADDING * len(cache.storage[0, 0]))
        pinned = device.type == "cuda"
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=pinned)
        self._inputs = torch.zeros(size, dtype=torch.int64, device=device)
        self._logits = torch.empty(most, vocabulary, device=device)  # float32, as they are drawn
        self._model, self._cache, self._routing, self._record = model, cache, routing, record
        self._most = most
        self._replays: dict[Shape, Replay] = {}
        self._generation = routing.generation
        self._unable = False
        self._filled = (0, 0)  # requests and blocks in the inputs
        self._tables: list[list[int]] = []  # the blocks of each request in the inputs

    def prepare(self) -> None:
        """Record the steps of short requests, so that nobody waits for it later.

        The largest come first: the others fit into their memory.
        """
        room = len(self._inputs) - 2 * self._most
        for requests in sorted({rounded(n + 1) for n in range(self._most)}, reverse=True):
            for adapters in (False, True):
                if not self._unable and requests * _FEWEST_BLOCKS <= room:
                    self._fill(requests, _FEWEST_BLOCKS, Batch.pack(()), ())
                    self._routing.rehearse(requests, adapters=adapters)
                    self._recorded(Shape(requests, _FEWEST_BLOCKS, adapters))
        logger.info("%d sizes of decode steps are recorded", len(self._replays))

    def run(self, batch: Batch) -> Tensor | None:
        """The logits [requests, vocabulary] of a batch, until the next one; None if it must run
        otherwise: because not all its tokens are next tokens, too much of it would be padding, or
        the model's steps cannot be recorded.
        """
        if self._unable or not batch.only_decodes:
            return None
        tables = [span.request.blocks for span in batch.spans]
        requests = rounded(len(tables))
        blocks = max(_FEWEST_BLOCKS, 1 << (max(map(len, tables)) - 1).bit_length())
        if requests * blocks > max(_ANYHOW, _MOST_PADDING * sum(map(len, tables))):
            return None
        self._fill(requests, blocks, batch, tables)
        padding = [0] * (requests - len(tables))
        adapters = self._routing.route([*batch.slots, *padding])
        replay = self._recorded(Shape(requests, blocks, adapters))
        if replay is None:
            return None
        replay()
        return self._logits[: len(tables)]

    def _recorded(self, shape: Shape) -> Replay | None:
        """What replays the step of a shape; None if the model's steps cannot be recorded."""
        if self._generation != self._routing.generation:
            self._generation = self._routing.generation
            self._replays.clear()
        if shape not in self._replays:
            try:
                self._replays[shape] = self._record(self._step(shape))
            except RuntimeError as error:  # CUDA's too, such as what a graph cannot hold
                logger.warning("decode steps cannot be recorded, and run eagerly: %s", error)
                self._unable = True
                self._replays.clear()  # their memory may be what was short
                return None
        return self._replays[shape]

    def _fill(self, requests: int, blocks: int, batch: Batch, tables: Sequence[list[int]]) -> None:
        """Put a batch in the inputs; what pads is token 0 at position 0, in the spare block."""
        if self._filled != (requests, blocks):
            self._filled, self._tables = (requests, blocks), [[] for _ in range(requests)]
        end = requests * (2 + blocks)
        tokens, positions, table = _split(self._host[:end], requests)
        rows = table.numpy()
        padding = [0] * (requests - len(tables))
        tokens.numpy()[:] = batch.tokens + padding
        positions.numpy()[:] = batch.positions + padding
        for row in range(requests):
            own = tables[row] if row < len(tables) else [self._cache.spare]
            if own != self._tables[row]:  # most requests have the blocks that they had
                rows[row] = own + [0] * (blocks - len(own))
                self._tables[row] = own.copy()
        # The host writes here again only after it has read what the step draws, or after the
        # recording of a step, which waits for the device.
        self._inputs[:end].copy_(self._host[:end], non_blocking=True)

    def _step(self, shape: Shape) -> Replay:
        """The function that computes the logits of what is in the inputs."""
        end = shape.requests * (2 + shape.blocks)
        tokens, positions, table = _split(self._inputs[:end], shape.requests)
        logits = self._logits[: shape.requests]

        def step() -> None:
            output = self._model(
                input_ids=tokens[None],
                position_ids=positions[None],
                use_cache=False,
                plan=self._cache.plan_decode(positions, table),
            )
            logits.copy_(output.logits[0])

        return step


def rounded(count: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is not below `count`."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if 2 < count <= power * 3 // 4 else power


def _split(numbers: Tensor, requests: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [requests], positions [requests] and blocks [requests, blocks] of an input."""
    tokens, positions, table = numbers.tensor_split((requests, 2 * requests))
    return tokens, positions, table.view(requests, -1)
