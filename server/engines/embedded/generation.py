"""A request under way in the embedded engine."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import torch

from polyrex.server.engines.base import GenerationRequest, Token, TokenChunk

from .sampling import Draw

Outcome = TokenChunk | Exception


@dataclass(eq=False)
class Generation:
    """A request under way: its tokens so far, and what it holds of the engine while it runs."""

    request: GenerationRequest
    loop: asyncio.AbstractEventLoop  # the caller's
    # Gets at most one outcome per token, so it never grows beyond the model's context.
    outcomes: asyncio.Queue[Outcome] = field(default_factory=asyncio.Queue)
    tokens: list[int] = field(init=False)  # of the prompt and the completion
    scores: list[Token] = field(init=False)  # of the prompt's tokens, if they are asked for
    draw: Draw = field(init=False)
    computed: int = 0  # the number of tokens whose keys are in the cache
    cached: int = 0  # of them, those of the prompt that others had computed
    blocks: list[int] = field(default_factory=list)  # of the cache
    known: int = 0  # the number of blocks, from the first, that others may use
    keys: list[bytes] = field(default_factory=list)  # of its full blocks (prefix_cache.py)
    slot: int = 0  # of the routing table

    def __post_init__(self) -> None:
        prompt, sampling = self.request.prompt, self.request.sampling
        self.tokens = list(prompt)
        self.scores = [Token(prompt[0])]
        generator = torch.Generator()
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed)
        self.draw = Draw(sampling, generator)

    @property
    def generated(self) -> int:
        """The number of tokens of the completion so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def pending(self) -> int:
        """The number of tokens to compute before the next one can be drawn."""
        return len(self.tokens) - self.computed

    def skip_to(self, computed: int) -> None:
        """Others have computed as many tokens, and their keys are in the request's blocks."""
        if not self.generated:
            self.cached += computed - self.computed
        self.computed = computed

    def restart(self) -> None:
        """It has no blocks any more, and is computed again when it has."""
        self.computed = self.known = 0
        if not self.generated:
            self.cached = 0

    def unscored(self, count: int) -> range:
        """The positions, among the next `count`, whose logits score a token of the prompt.

        The logits at a position score the token that follows it.
        """
        if self.request.sampling.prompt_logprobs is None:
            return range(0)
        end = min(self.computed + count, len(self.request.prompt) - 1)
        return range(max(self.computed, len(self.scores) - 1), end)
