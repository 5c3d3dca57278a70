"""The bodies of requests, as they come over the wire: OpenAI's shapes plus the field `task`.

Every field that a body may hold stands here; any other is refused, so that no option is ever
silently ignored. A field that is null counts as not given, as in OpenAI's schema. The fields of
`OnlyNeutral` exist because clients send them with values that change nothing: only those are taken.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MAX_CHOICES = 8
MAX_LOGPROBS = 20
MAX_PROMPTS = 32


def _encodable(text: str) -> str:
    # JSON can spell half a surrogate pair, which is no text and which no tokenizer takes.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half a surrogate pair") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
StopString = Annotated[Text, Field(min_length=1, max_length=256)]
Prompt = (
    Text
    | TokenIds
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
)


class Wire(BaseModel):
    """A JSON object that holds the fields below and no others, each of exactly its type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {k: v for k, v in body.items() if v is not None or k not in cls.model_fields}


class OnlyNeutral(Wire):
    """Fields of OpenAI's that polyrex does not have, at the values that ask for nothing."""

    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] = {}


class StreamOptions(Wire):
    """How to stream."""

    include_usage: bool = False


class Sampling(OnlyNeutral):
    """What completions and chat completions have in common."""

    model: Text | None = Field(None, description="the base model's id, or the name of a task")
    task: Text | None = Field(None, description="the task to answer; the base model without one")
    intuition: Literal["prompt"] | None = Field(
        None, description="route by what the prompt says, instead of by a task"
    )
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] = []
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = Field(False, description="go on after the end-of-sequence token")
    user: Text | None = Field(None, description="accepted, and not used")

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whichever way it was given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Sampling):
    """The body of POST /v1/completions."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0)] = 16
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
        """The prompts one by one, each as text or as token ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextPart(Wire):
    """A piece of a chat message."""

    type: Literal["text"]
    text: Text


class Message(Wire):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: Text | None = Field(None, description="accepted, and not used")

    @property
    def text(self) -> str:
        """The content as one string; parts are put on lines of their own."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class ChatCompletionRequest(Sampling):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same: give one")
        return self


class NewTask(Wire):
    """The JSON body of POST /v1/tasks."""

    name: Text
    router: Annotated[str, Field(description="the router file, base64")]


class FitRow(Wire):
    """One labelled example."""

    input: Text
    answer: Annotated[Text, Field(min_length=1)]
    options: Annotated[list[Text], Field(min_length=2, max_length=64)] | None = None

    @model_validator(mode="after")
    def _answer_is_an_option(self) -> FitRow:
        if self.options is not None and self.answer not in self.options:
            raise ValueError(f"answer {self.answer!r:.80} is not among the options")
        return self


class FitRequest(Wire):
    """The body of POST /v1/tasks/{name}/fit."""

    instruction: Annotated[Text, Field(min_length=1)]
    rows: Annotated[list[FitRow], Field(min_length=8, max_length=1024)]
    replace: bool = Field(False, description="give an existing task a new version")


class RouterBody(Wire):
    """The JSON body of PUT /v1/tasks/{name}."""

    router: Annotated[str, Field(description="the router file, base64")]
