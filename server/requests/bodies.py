"""Request bodies as they come over the wire: OpenAI's schema plus the fields of polyrex.

Every field that a body may have is declared here; any other is refused, so that no option is ever
silently ignored. A field that is null counts as not given, as in OpenAI's schema. The fields of
`OnlyNeutral` exist because clients send them with values that change nothing; only those values
are accepted.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from polyrex.adapters.errors import DataError
from polyrex.adapters.rows import Row, parse_row

MAX_CHOICES = 8
MAX_LOGPROBS = 20
MAX_PROMPTS = 32
MAX_MESSAGES = 1024
MAX_PARTS = 1024
MAX_NAME = 256
MAX_INTEGER = 2**31  # of token ids and numbers of tokens


def _encodable(text: str) -> str:
    # JSON can spell half a surrogate pair, which is not text: no tokenizer accepts it.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half a surrogate pair") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Name = Annotated[Text, Field(max_length=MAX_NAME)]
TokenId = Annotated[int, Field(ge=0, lt=MAX_INTEGER)]
# A list stops at its first bad item: the errors of all of them would take seconds.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
StopString = Annotated[Text, Field(min_length=1, max_length=256)]
Prompts = Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)
Prompt = Text | TokenIds | Annotated[list[Text], Prompts] | Annotated[list[TokenIds], Prompts]


def _none_of(kind: type[list[Any]] | type[dict[str, Any]]) -> Any:
    # A default that could be changed would be copied for every request, at several microseconds.
    return Field(default_factory=kind, json_schema_extra={"default": kind()})


class Wire(BaseModel):
    """A JSON object with exactly the declared fields, each of exactly its type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, body: Any) -> Any:
        if not isinstance(body, dict) or None not in body.values():
            return body
        return {k: v for k, v in body.items() if v is not None or k not in cls.model_fields}


class OnlyNeutral(Wire):
    """OpenAI's fields that polyrex does not implement, at their neutral values only."""

    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] = _none_of(dict)


class StreamOptions(Wire):
    """Options of a streamed response."""

    include_usage: bool = False


class Sampling(OnlyNeutral):
    """The fields that completions and chat completions share."""

    model: Name | None = Field(None, description="the base model's id, or a task's name")
    task: Name | None = Field(
        None, description="the task that answers; without one, the base model"
    )
    intuition: Literal["prompt"] | None = Field(
        None, description="route by the prompt's own embedding instead of a task's router"
    )
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4, fail_fast=True)] = _none_of(
        list
    )
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = Field(False, description="continue past the end-of-sequence token")
    cache_salt: Annotated[Name, Field(min_length=1)] | None = Field(
        None, description="only requests with the same salt share cached prefixes with this one"
    )
    user: Name | None = Field(
        None, description="the same user gets the same version of a task with a canary"
    )

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whether it was one string or a list."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Sampling):
    """The body of POST /v1/completions."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0, lt=MAX_INTEGER)] = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool = False
    best_of: Annotated[int, Field(ge=1, le=1)] = 1
    suffix: Annotated[str, Field(max_length=0)] = ""

    @model_validator(mode="after")
    def _something_to_answer(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1 without echo")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list, each as text or as token ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @property
    def completions(self) -> int:
        """How many completions the response has."""
        return len(self.prompts) * self.n


class TextPart(Wire):
    """One part of a chat message."""

    type: Literal["text"]
    text: Text


class Message(Wire):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: (
        Text | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
    )
    name: Name | None = Field(None, description="accepted, and not used")

    @property
    def text(self) -> str:
        """The content as one string, with each part on a line of its own."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class ChatCompletionRequest(Sampling):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, lt=MAX_INTEGER)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=MAX_INTEGER)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same: give one")
        return self

    @property
    def completions(self) -> int:
        """How many completions the response has."""
        return self.n


VersionNumber = Annotated[int, Field(ge=1, lt=10**9)]


class RouterBody(Wire):
    """The JSON body of PUT /v1/tasks/{name}."""

    router: Annotated[str, Field(description="the router file, base64")]
    labels: dict[str, str] | None = Field(None, description="replace the task's labels")


class NewTask(RouterBody):
    """The JSON body of POST /v1/tasks."""

    name: Name


class RollBack(Wire):
    """The JSON body of POST /v1/tasks/{name}/rollback."""

    version: VersionNumber | None = Field(
        None, description="the version to go to; without one, the last before the current one"
    )


class AliasBody(Wire):
    """The JSON body of PUT /v1/tasks/{name}/aliases/{alias}."""

    version: VersionNumber


class CanaryBody(Wire):
    """The JSON body of PUT /v1/tasks/{name}/canary."""

    version: VersionNumber
    share: Annotated[float, Field(ge=0, le=1, description="of the task's requests")]


class LoadLora(Wire):
    """The body of POST /v1/load_lora_adapter, as vLLM has it."""

    lora_name: Name
    lora_path: Text = Field(description="a router, or a folder with one, below --lora-dir")
    load_inplace: bool = Field(False, description="give an existing task a new version")
    is_3d_lora_weight: Literal[False] = False


class UnloadLora(Wire):
    """The body of POST /v1/unload_lora_adapter, as vLLM has it."""

    lora_name: Name
    lora_int_id: int | None = Field(None, description="accepted, and not used")


MAX_ROWS, MIN_ROWS, MAX_OPTIONS = 1024, 8, 64
_ROW_KEYS = {"input", "answer", "options"}


def _rows(values: Any) -> tuple[Row, ...]:
    """The rows of a fit; the schema of a row is that of adapters/rows.py, without a split."""
    if not isinstance(values, list) or not MIN_ROWS <= len(values) <= MAX_ROWS:
        count = len(values) if isinstance(values, list) else repr(values)[:80]
        raise ValueError(f"expected a list of {MIN_ROWS} to {MAX_ROWS} rows, got {count}")
    rows = []
    for index, value in enumerate(values):
        try:
            row = parse_row(value, f"rows[{index}]")
        except DataError as error:
            raise ValueError(str(error)) from error
        if unknown := value.keys() - _ROW_KEYS:
            raise ValueError(f"rows[{index}]: unknown field {min(unknown)!r:.80}")
        if not row.answer:
            raise ValueError(f"rows[{index}]: `answer` is empty")
        options = value.get("options")
        if options is not None and not 2 <= len(options) <= MAX_OPTIONS:
            count = f"2 to {MAX_OPTIONS} entries, got {len(options)}"
            raise ValueError(f"rows[{index}]: `options` must have {count}")
        rows.append(row)
    return tuple(rows)


_ROWS_SCHEMA = {
    "type": "array",
    "minItems": MIN_ROWS,
    "maxItems": MAX_ROWS,
    "items": {
        "type": "object",
        "required": ["input", "answer"],
        "additionalProperties": False,
        "properties": {
            "input": {"type": "string"},
            "answer": {"type": "string", "minLength": 1},
            "options": {
                "type": ["array", "null"],
                "items": {"type": "string"},
                "minItems": 2,
                "maxItems": MAX_OPTIONS,
            },
        },
    },
}


class FitRequest(Wire):
    """The body of POST /v1/tasks/{name}/fit."""

    instruction: Annotated[Text, Field(min_length=1)]
    rows: Annotated[tuple[Row, ...], PlainValidator(_rows), WithJsonSchema(_ROWS_SCHEMA)]
    replace: bool = Field(False, description="give an existing task a new version")
