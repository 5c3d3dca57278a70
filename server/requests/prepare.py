"""From a validated request body to the requests that the engine gets.

The tokenizer takes time, so large prompts are encoded off the event loop, a few at a time. A router
that is not in memory is read from the database, in other threads: preparing what needs none waits
for no database.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVarTuple

from polyrex.adapters.errors import UnknownTask
from polyrex.adapters.files.task import TaskVersion
from polyrex.server.engines.base import Engine, GenerationRequest, SamplingParams
from polyrex.server.errors import InvalidRequest, UnknownModel
from polyrex.server.registry.principal import Principal
from polyrex.server.registry.registry import TaskRegistry

from .bodies import ChatCompletionRequest, CompletionRequest, Sampling
from .cache_salt import CacheSalts
from .database_calls import DatabaseCalls
from .prompt_routing import PromptIntuition
from .text import Tokenizer, ordinary_length

_THREADS = 2
"""Prompts that are encoded at the same time; others wait, and leave if their client does."""
_FEW = 512
"""Characters or tokens that take less time than a change of threads."""
_A_MESSAGE = 64
"""As many characters as it takes to render one message of a chat, about."""

Ts = TypeVarTuple("Ts")


@dataclass(frozen=True)
class Choice:
    """One completion of a response: the engine's request, and how its tokens become text."""

    request: GenerationRequest
    stop: tuple[str, ...]
    echo: str | None  # the prompt's text, where the response repeats it


@dataclass(frozen=True)
class PreparedRequest:
    """A request, ready for the engine. Its task version is pinned: it answers to the end."""

    id: str
    created: int
    model: str  # as the response names it
    task: TaskVersion | None
    prompt_tokens: int
    choices: tuple[Choice, ...]  # those of the first prompt, then those of the second, ...
    n: int  # choices of each prompt


@dataclass(frozen=True)
class _Prompt:
    ids: tuple[int, ...]
    echo: str | None


class RequestPreparer:
    """Prepares requests for one base model and its tasks.

    `completion` and `chat` raise InvalidRequest, UnknownModel, or what `TaskRegistry.pin` raises.
    """

    def __init__(
        self,
        base: str,
        registry: TaskRegistry,
        reads: DatabaseCalls,
        tokenizer: Tokenizer,
        engine: Engine,
        intuition: PromptIntuition | None,
    ) -> None:
        """`base` is the base model's id. Of the engine, only its context length is asked."""
        self._base = base
        self._registry = registry
        self._reads = reads
        self._tokenizer = tokenizer
        self._engine = engine
        self._intuition = intuition
        self._salts = CacheSalts(registry.database.secret, registry.inventory.sha256)
        self._threads = ThreadPoolExecutor(_THREADS, "tokenizer")
        # What probably does not fit takes up to seconds, and makes no other prompt wait.
        self._oversized = ThreadPoolExecutor(1, "tokenizer-oversized")

    async def completion(self, body: CompletionRequest, asker: Principal) -> PreparedRequest:
        """Prepare a POST /v1/completions."""
        task = await self._task(body, asker)
        room = self._room(body.max_tokens)
        prompts = [
            await self._encode(len(prompt), room, self._prompt, prompt, body, room)
            for prompt in body.prompts
        ]
        tasks = await self._tasks(body, task, prompts)
        return self._prepare("cmpl", body, asker, tasks, prompts, body.max_tokens, body.logprobs)

    async def chat(self, body: ChatCompletionRequest, asker: Principal) -> PreparedRequest:
        """Prepare a POST /v1/chat/completions; without max_tokens, the context is the limit."""
        task = await self._task(body, asker)
        wanted = body.max_completion_tokens or body.max_tokens
        room = self._room(wanted or 1)
        size = sum(len(message.text) + _A_MESSAGE for message in body.messages)
        prompts = [await self._encode(size, room, self._chat, body, room)]
        tasks = await self._tasks(body, task, prompts)
        max_tokens = wanted or self._engine.context_length - len(prompts[0].ids)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return self._prepare("chatcmpl", body, asker, tasks, prompts, max_tokens, logprobs)

    def close(self) -> None:
        """Wait for the prompts that are being encoded; those that wait for it are not any more."""
        for threads in (self._threads, self._oversized):
            threads.shutdown(cancel_futures=True)

    async def _encode(
        self, size: int, room: int, function: Callable[[*Ts], _Prompt], *args: *Ts
    ) -> _Prompt:
        """The prompt that the function makes of so many characters; in a thread if they are many.

        Each prompt is a call of its own: a request with many waits its turn before each of them.
        """
        if size <= _FEW:
            return function(*args)
        threads = self._threads if size <= ordinary_length(room) else self._oversized
        return await asyncio.get_running_loop().run_in_executor(threads, function, *args)

    def _room(self, max_tokens: int) -> int:
        """The most tokens that a prompt may have; raises InvalidRequest where it is none."""
        context_length = self._engine.context_length
        # Where no token is wanted, engines still generate one, and drop it.
        if max_tokens >= context_length:
            raise InvalidRequest(
                f"max_tokens is {max_tokens}; the model's context holds {context_length}",
                "max_tokens",
            )
        return context_length - max(1, max_tokens)

    def _chat(self, body: ChatCompletionRequest, room: int) -> _Prompt:
        messages = [{"role": message.role, "content": message.text} for message in body.messages]
        text = self._tokenizer.render_chat(messages)
        return _Prompt(self._encoded(text, room, "messages", special=False), None)

    def _prompt(self, prompt: str | list[int], body: CompletionRequest, room: int) -> _Prompt:
        if isinstance(prompt, str):
            return _Prompt(self._encoded(prompt, room, "prompt"), prompt if body.echo else None)
        self._check_prompt(prompt, room, "prompt")
        return _Prompt(tuple(prompt), self._tokenizer.decode(prompt) if body.echo else None)

    def _encoded(
        self, text: str, room: int, param: str, *, special: bool = True
    ) -> tuple[int, ...]:
        """The tokens of a text; one that is far too long is refused before it is encoded."""
        if self._tokenizer.exceeds(text, room):
            raise self._too_long(param, f"more than {room}", room)
        ids = self._tokenizer.encode(text, special=special)
        self._check_prompt(ids, room, param)
        return tuple(ids)

    def _check_prompt(self, ids: Sequence[int], room: int, param: str) -> None:
        """Refuse, as the client's error, what GenerationRequest.check would fail in the engine.

        That check stays as the engine's own guard, for callers that do not come through here.
        """
        if not ids:
            raise InvalidRequest(f"{param}: holds no tokens", param)
        if len(ids) > room:
            raise self._too_long(param, str(len(ids)), room)
        if max(ids) >= self._tokenizer.vocabulary_size:
            raise InvalidRequest(
                f"{param}: token id {max(ids)} is not in the vocabulary of "
                f"{self._tokenizer.vocabulary_size}",
                param,
            )

    def _too_long(self, param: str, tokens: str, room: int) -> InvalidRequest:
        context_length = self._engine.context_length
        return InvalidRequest(
            f"{param} has {tokens} tokens and asks for {context_length - room} more; "
            f"the model's context holds {context_length}",
            param,
        )

    def _prepare(
        self,
        prefix: str,
        body: Sampling,
        asker: Principal,
        tasks: Sequence[TaskVersion | None],
        prompts: Sequence[_Prompt],
        max_tokens: int,
        logprobs: int | None,
    ) -> PreparedRequest:
        request_id = f"{prefix}-{uuid.uuid4().hex}"
        choices: list[Choice] = []
        for prompt, version in zip(prompts, tasks, strict=True):
            router = "" if version is None else version.info.router_sha256
            salt = self._salts.of(asker.tenant, router, body.cache_salt or "")
            for repeat in range(body.n):
                sampling = SamplingParams(
                    max_tokens=max_tokens,
                    temperature=body.temperature,
                    top_p=body.top_p,
                    # A prompt's choices differ from each other, and each is repeatable.
                    seed=None if body.seed is None else body.seed + repeat,
                    logprobs=logprobs,
                    prompt_logprobs=None if prompt.echo is None else logprobs,
                    ignore_eos=body.ignore_eos,
                )
                request = GenerationRequest(
                    f"{request_id}-{len(choices)}", prompt.ids, sampling, version, salt
                )
                choices.append(Choice(request, body.stop_strings, prompt.echo))
        return PreparedRequest(
            id=request_id,
            created=int(time.time()),
            model=body.model or body.task or self._base,
            task=tasks[0],
            prompt_tokens=sum(len(prompt.ids) for prompt in prompts),
            choices=tuple(choices),
            n=body.n,
        )

    async def _tasks(
        self, body: Sampling, task: TaskVersion | None, prompts: Sequence[_Prompt]
    ) -> Sequence[TaskVersion | None]:
        """The task version that answers each prompt: one for all, or each prompt's own routing."""
        if body.intuition is None:
            return [task] * len(prompts)
        intuition = self._intuition
        if intuition is None:
            raise InvalidRequest("this server's inventory has no intuition", "intuition")

        def route() -> Sequence[TaskVersion]:
            return intuition.versions([self._tokenizer.decode(prompt.ids) for prompt in prompts])

        return await asyncio.get_running_loop().run_in_executor(self._threads, route)

    async def _task(self, body: Sampling, asker: Principal) -> TaskVersion | None:
        """The version of the task that `task` or `model` names; None for the base model."""
        if body.intuition is not None:
            if body.task is not None or body.model not in (None, self._base):
                raise InvalidRequest("give a task, or intuition, and not both", "intuition")
            return None
        name = body.task
        if body.model is not None and body.model != self._base:
            if name is not None and name != body.model:
                raise InvalidRequest(
                    f"model {body.model!r:.80} and task {name!r:.80} are different tasks", "task"
                )
            name = body.model
        if name is None:
            return None
        try:
            return await self._pin(asker, name, body.user)
        except UnknownTask as error:
            if body.task is not None:
                raise
            raise UnknownModel(
                f"no such model or task, or not for this key; the base model is {self._base!r}"
            ) from error

    async def _pin(self, asker: Principal, name: str, user: str | None) -> TaskVersion:
        # Whether a canary answers is drawn once, and not again where the database has to be asked.
        sticky = uuid.uuid4().hex if user is None else user
        found = self._registry.pin_cached(asker, name, sticky=sticky)
        if found is None:
            found = await self._reads.run(self._registry.pin, asker, name, sticky=sticky)
        return found
