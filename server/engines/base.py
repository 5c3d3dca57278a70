"""The nouns that pass between the HTTP layer and an engine, and the protocol of an engine.

Engines work on token ids. Text (prompts, chat templates, stop strings, incremental decoding) is
the HTTP layer's business, the same for every engine.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from polyrex.adapters.files.task import TaskVersion
from polyrex.server.errors import EngineError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How one completion is drawn. temperature 0 is greedy.

    `seed` makes a sampled completion repeatable whatever else is in the batch.
    `logprobs` asks for each token's log-probability and that many alternatives (0: only its own);
    `prompt_logprobs` the same for the prompt's tokens.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False


@dataclass(frozen=True)
class GenerationRequest:
    """One completion of one prompt for one pinned task version; no task is the base model."""

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    task: TaskVersion | None = None

    def check(self, vocabulary: int, context_length: int) -> None:
        """Refuse what would hurt others in the batch, or never end: raises EngineError.

        `vocabulary` and `context_length` are tokens. A request that wants no completion takes
        the place of one token all the same: engines draw it, and drop it.
        """
        prompt, wanted = self.prompt, max(1, self.sampling.max_tokens)
        if not prompt:
            raise EngineError("the prompt has no tokens")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise EngineError(f"prompt token ids must be from 0 to {vocabulary - 1}")
        if len(prompt) + wanted > context_length:
            raise EngineError(
                f"prompt and completion have {len(prompt)} + {wanted} tokens, "
                f"the engine holds {context_length}"
            )


@dataclass(frozen=True)
class Token:
    """A token with its log-probability and the best alternatives, where they were asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenChunk:
    """Tokens that became ready together. The last chunk of a request has a finish reason.

    `prompt` is filled in the first chunk where prompt log-probabilities were asked for: one Token
    a prompt token, the first without a log-probability. An end-of-sequence token is not in
    `tokens`: finish_reason "stop" stands for it.
    """

    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None = None
    prompt: tuple[Token, ...] | None = None


@dataclass(frozen=True)
class EngineStats:
    """Gauges and running totals, read by /metrics and /readyz."""

    running: int
    waiting: int
    kv_cache_usage: float  # 0 to 1
    slots_used: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    adapter_steps: Mapping[str, int] = field(default_factory=dict)
    """Forward passes with adapters by how they ran (kernels/plan.py), where the engine knows."""


class Engine(Protocol):
    """Runs generation requests for any mix of task versions in one batch."""

    @property
    def context_length(self) -> int:
        """Most tokens that a prompt and its completion may have together."""
        ...

    async def start(self) -> None:
        """Load, warm up and begin to serve; returns when the first request will be fast."""
        ...

    async def stop(self) -> None:
        """End every request with EngineStopped and free what the engine holds."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Stream the completion. Closing the generator early aborts the request in the engine.

        Raises EngineStopped when the engine is down, EngineError when this request failed.
        """
        ...

    def check(self) -> None:
        """Raise EngineStopped when the engine cannot serve: /livez and /readyz ask this."""
        ...

    def stats(self) -> EngineStats:
        """A snapshot; cheap, never blocks."""
        ...
