"""The JSON of successful answers, for the OpenAPI document.

Nothing is built from these classes: responses are made by responses.py and the routes, and a test
holds what they make against the document.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from polyrex.server.registry.principal import Role
from polyrex.server.registry.tenants.records import Quotas


class Shape(BaseModel):
    """A JSON object that has all of these fields, and no other."""

    model_config = ConfigDict(extra="forbid")


class Index(Shape):
    """The server, and where to go from here."""

    name: Literal["polyrex"]
    version: str
    docs: str
    tasks: str
    models: str
    metrics: str
    health: str


class Alive(Shape):
    """The process works."""

    status: Literal["alive"]


class Ready(Shape):
    """Requests are answered; `degraded`: tasks cannot be changed, as the database fails."""

    status: Literal["ready", "degraded"]


class CompletionLogprobs(Shape):
    """Log-probabilities of a completion's tokens."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Shape):
    """One of the completions."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class CachedTokens(Shape):
    """How much of the prompts was computed before."""

    cached_tokens: int


class Usage(Shape):
    """Token counts; a prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Completion(Shape):
    """Completions of the prompts, in their order."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[CompletionChoice]
    usage: Usage


class TopToken(Shape):
    """A token that was likely."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(TopToken):
    """A token of the answer, and what was likely in its place."""

    top_logprobs: list[TopToken]


class ChatLogprobs(Shape):
    """Log-probabilities of an answer's tokens."""

    content: list[ChatToken]


class Answer(Shape):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str


class ChatChoice(Shape):
    """One of the answers."""

    index: int
    message: Answer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(Shape):
    """Answers to a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChatChoice]
    usage: Usage


class Model(Shape):
    """The base model, or a task as a model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(Shape):
    """A page of models."""

    object: Literal["list"]
    data: list[Model]
    has_more: bool


class Version(Shape):
    """One version of a task."""

    version: int
    router_sha256: str
    size_bytes: int
    created: int
    description: str
    provenance: dict[str, Any]
    scores: dict[str, Any]
    template: str | None
    servable: bool


class VersionList(Shape):
    """The versions of a task that are kept."""

    object: Literal["list"]
    data: list[Version]


class Canary(Shape):
    """A version that answers a share of the requests; `requests` counts them, by version."""

    version: int
    share: float
    requests: dict[str, int] | None


class Task(Version):
    """A task, in the version that was asked for."""

    name: str
    object: Literal["task"]
    tenant: str
    current_version: int
    last_version: int
    labels: dict[str, str]
    aliases: dict[str, int]
    canary: Canary | None
    shared_with: list[str]
    deleted: int | None


class TaskList(Shape):
    """A page of tasks."""

    object: Literal["list"]
    data: list[Task]
    has_more: bool


class DroppedTask(Shape):
    """A task that was dropped."""

    name: str
    object: Literal["task"]
    deleted: Literal[True]


class Whoami(Shape):
    """Whose key this is."""

    tenant: str
    role: Role
    key: str | None
    quotas: Quotas


class Tenant(Shape):
    """A tenant."""

    name: str
    object: Literal["tenant"]
    created: int
    quotas: Quotas
    disabled: bool


class TenantList(Shape):
    """A page of tenants."""

    object: Literal["list"]
    data: list[Tenant]
    has_more: bool


class ApiKey(Shape):
    """An API key, without its secret."""

    id: str
    object: Literal["key"]
    tenant: str
    role: Role
    label: str
    created: int
    expires: float | None
    revoked: float | None


class NewApiKey(ApiKey):
    """An API key that was just made, whole."""

    key: str


class ApiKeyList(Shape):
    """The API keys of a tenant."""

    object: Literal["list"]
    data: list[ApiKey]
    has_more: bool


class ErrorDetails(Shape):
    """What went wrong: in words for people, as a code for programs."""

    message: str
    type: str
    param: str | None
    code: str | int


class Error(Shape):
    """An error, in the shape of OpenAI's."""

    error: ErrorDetails
