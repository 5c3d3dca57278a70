"""The objects that the HTTP layer and an engine exchange, and the protocol of an engine.

Engines work on token ids. Text (prompts, chat templates, stop strings, incremental decoding) is
handled in server/requests, the same way for every engine.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from polyrex.server.errors import EngineError

if TYPE_CHECKING:  # it brings PyTorch, and an engine need not
    from polyrex.adapters.files.task import TaskVersion

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How one completion is drawn. Temperature 0 is greedy.

    `seed` makes a sampled completion repeatable, whatever else is in the batch. `logprobs` asks for
    the log-probability of each token, and of that many alternatives (0 for none); `prompt_logprobs`
    asks for the same of the prompt's tokens.
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
    """One completion of one prompt, by a pinned task version; without a task, by the base model."""

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    task: TaskVersion | None = None
    cache_salt: str = ""
    """Requests share cached keys and values of a prefix only where this is the same: it stands for
    inventory, tenant, router and the client's own salt (requests/cache_salt.py)."""
    ended: Callable[[], None] | None = field(default=None, compare=False, repr=False)
    """Called in the event loop, once, when the engine has nothing more to do for the request: its
    last chunks may not have been read yet. An engine in this very process may leave it out."""

    def check(self, vocabulary: int, context_length: int) -> None:
        """Raise EngineError where this request would harm others in its batch, or never end.

        This is the engine's own guard: server/requests refuses the same as the client's error.
        `vocabulary` and `context_length` are numbers of tokens. A request without a completion
        still needs room for one token: engines draw it, and drop it.
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
    """A token, with its log-probability and the best alternatives if they were asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenChunk:
    """Tokens that became ready together. The last chunk of a request has a finish reason.

    If prompt log-probabilities were asked for, the first chunk has them in `prompt`: a Token for
    each token of the prompt, the first without a log-probability. An end-of-sequence token is not
    in `tokens`: the finish reason "stop" stands for it. Every chunk says how many of the prompt's
    tokens were `cached`: their keys and values were there, and were not computed again.
    """

    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None = None
    prompt: tuple[Token, ...] | None = None
    cached: int = 0


@dataclass(frozen=True)
class EngineStats:
    """Gauges and running totals for /metrics and /readyz."""

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0  # 0 to 1
    slots_used: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    adapter_steps: Mapping[str, int] = field(default_factory=dict)
    """Forward passes with adapters, by path (kernels/step_plan.py), if the engine counts them."""
    prefix_queries: int = 0  # prompt tokens that were looked for in the prefix cache
    prefix_hits: int = 0  # of them, those that were found
    kv_block_size: int = 0  # tokens
    kv_blocks: int = 0  # of the whole cache; 0 while the engine is not up
    preemptions: int = 0  # requests that lost their place in the cache, and wait again
    restarts: int = 0  # of a failed engine


class Engine(Protocol):
    """Runs generation requests of any mix of task versions in one batch."""

    @property
    def context_length(self) -> int:
        """The most tokens that a prompt and its completion may have together."""
        ...

    @property
    def most_running(self) -> int:
        """How many requests it runs at the same time; it is known before the start."""
        ...

    async def start(self) -> None:
        """Load, begin to serve, and warm up, so that the first request is as fast as later ones."""
        ...

    async def stop(self) -> None:
        """End every request with EngineStopped, and free the engine's resources."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Stream the completion. Closing the generator early aborts the request in the engine.

        Raises EngineStopped if the engine is down, EngineError if this request failed.
        """
        ...

    def check(self) -> None:
        """Raise EngineStopped if the engine cannot serve; /livez and /readyz call this.

        EngineRestarting says that it will serve again, without anybody doing anything.
        """
        ...

    def stats(self) -> EngineStats:
        """A snapshot. It is cheap and never blocks."""
        ...
