"""From a checked request body to what the engine is asked: the request's plan.

Making a plan reads a router file and runs the tokenizer: it is called off the event loop.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from polyrex.adapters.errors import FileError, UnknownTask
from polyrex.adapters.files.registry import TaskVersion
from polyrex.server.engines.base import GenerationRequest, SamplingParams
from polyrex.server.errors import InvalidRequest, TaskDamaged, UnknownModel
from polyrex.server.http.context import Services

from .bodies import ChatCompletionRequest, CompletionRequest, Sampling


@dataclass(frozen=True)
class Choice:
    """One completion of a response: what the engine gets, and how its tokens become text."""

    request: GenerationRequest
    stop: tuple[str, ...]
    echo: str | None  # the prompt's text, where it is to be repeated


@dataclass(frozen=True)
class Plan:
    """A request, ready for the engine. The task's version is pinned: it answers to the end."""

    id: str
    created: int
    model: str  # as the response names it
    task: TaskVersion | None
    prompt_tokens: int
    choices: tuple[Choice, ...]

    @property
    def fingerprint(self) -> str | None:
        """Which task version answers, for OpenAI's field system_fingerprint."""
        if self.task is None:
            return None
        info = self.task.info
        return f"{info.name}@{info.version}:{info.router_sha256[:12]}"

    @property
    def headers(self) -> dict[str, str]:
        """The response header that says which task version answers."""
        if self.task is None:
            return {}
        return {"x-polyrex-task-version": f"{self.task.info.name}@{self.task.info.version}"}


def plan_completion(services: Services, body: CompletionRequest) -> Plan:
    """The plan of POST /v1/completions; raises InvalidRequest, UnknownTask, UnknownModel."""
    prompts = [
        services.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        for prompt in body.prompts
    ]
    for ids in prompts:
        _check_prompt(services, ids, body.max_tokens, "prompt")
    echoes = [
        (prompt if isinstance(prompt, str) else services.tokenizer.decode(prompt))
        if body.echo
        else None
        for prompt in body.prompts
    ]
    return _plan(
        services, body, "cmpl", prompts, echoes,
        max_tokens=body.max_tokens, logprobs=body.logprobs,
    )  # fmt: skip


def plan_chat(services: Services, body: ChatCompletionRequest) -> Plan:
    """The plan of POST /v1/chat/completions; without max_tokens, up to the context's end."""
    ids = services.tokenizer.encode_chat(
        [{"role": message.role, "content": message.text} for message in body.messages]
    )
    wanted = body.max_completion_tokens or body.max_tokens
    _check_prompt(services, ids, wanted or 1, "messages")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _plan(
        services, body, "chatcmpl", [ids], [None],
        max_tokens=wanted or services.engine.context_length - len(ids), logprobs=logprobs,
    )  # fmt: skip


def _pin(services: Services, body: Sampling) -> TaskVersion | None:
    base = services.config.model
    name = body.task
    if body.model is not None and body.model != base:
        if name is not None and name != body.model:
            raise InvalidRequest(
                f"model {body.model!r:.80} and task {name!r:.80} are different tasks", "task"
            )
        name = body.model
    if name is None:
        return None
    try:
        return services.registry.pin(name)
    except UnknownTask as error:
        if body.task is not None:
            raise
        raise UnknownModel(f"no model or task {name!r:.80}; the base model is {base!r}") from error
    except FileError as error:
        raise TaskDamaged(f"task {name}: its router cannot be read") from error


def _routing(
    services: Services, body: Sampling, prompts: Sequence[Sequence[int]]
) -> list[TaskVersion | None]:
    """What routes each prompt: the task, or what the prompt itself says."""
    if body.intuition is None:
        return [_pin(services, body)] * len(prompts)
    if body.task is not None or body.model not in (None, services.config.model):
        raise InvalidRequest("give a task, or intuition, and not both", "intuition")
    if services.intuition is None:
        raise InvalidRequest("this server's inventory has no intuition", "intuition")
    texts = [services.tokenizer.decode(list(ids)) for ids in prompts]
    return list(services.intuition.versions(texts))


def _check_prompt(services: Services, ids: Sequence[int], max_tokens: int, param: str) -> None:
    if not ids:
        raise InvalidRequest(f"{param}: holds no tokens", param)
    if max(ids) >= services.tokenizer.vocabulary_size:
        raise InvalidRequest(
            f"{param}: token id {max(ids)} is not in the vocabulary of "
            f"{services.tokenizer.vocabulary_size}",
            param,
        )
    # Engines draw one token where none is wanted, and drop it.
    if len(ids) + max(1, max_tokens) > services.engine.context_length:
        raise InvalidRequest(
            f"{param} has {len(ids)} tokens and asks for {max_tokens} more; "
            f"the model's context holds {services.engine.context_length}",
            param,
        )


def _plan(
    services: Services,
    body: Sampling,
    prefix: str,
    prompts: Sequence[Sequence[int]],
    echoes: Sequence[str | None],
    *,
    max_tokens: int,
    logprobs: int | None,
) -> Plan:
    plan_id = f"{prefix}-{uuid.uuid4().hex}"
    choices: list[Choice] = []
    tasks = _routing(services, body, prompts)
    for ids, echo, task in zip(prompts, echoes, tasks, strict=True):
        for repeat in range(body.n):
            sampling = SamplingParams(
                max_tokens=max_tokens,
                temperature=body.temperature,
                top_p=body.top_p,
                # Choices of one prompt differ, and each is the same every time.
                seed=None if body.seed is None else body.seed + repeat,
                logprobs=logprobs,
                prompt_logprobs=None if echo is None else logprobs,
                ignore_eos=body.ignore_eos,
            )
            request = GenerationRequest(f"{plan_id}-{len(choices)}", tuple(ids), sampling, task)
            choices.append(Choice(request, body.stop_strings, echo))
    return Plan(
        id=plan_id,
        created=int(time.time()),
        model=body.model or body.task or services.config.model,
        task=tasks[0],
        prompt_tokens=sum(len(ids) for ids in prompts),
        choices=tuple(choices),
    )
