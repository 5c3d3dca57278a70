"""The JSON of responses: OpenAI's two shapes, whole and streamed, and the tasks of polyrex."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, ClassVar

from polyrex.server.registry.principal import Principal, Role
from polyrex.server.registry.records import Canary, TaskRecord, VersionRecord
from polyrex.server.requests.generation import Piece, TextToken
from polyrex.server.requests.prepare import PreparedRequest

Json = dict[str, Any]

LEAST_LOGPROB = -9999.0
"""The log-probability shown for a probability of 0: JSON has no infinity."""


def version_headers(prepared: PreparedRequest) -> dict[str, str]:
    """The response header that says which task version answers."""
    if prepared.task is None:
        return {}
    return {"x-polyrex-task-version": f"{prepared.task.info.name}@{prepared.task.info.version}"}


def task_shape(
    task: TaskRecord,
    asker: Principal,
    served: str,
    version: VersionRecord | None = None,
    counted: Mapping[int, int] | None = None,
) -> Json:
    """A task, as every route that shows one shows it; `served` is the server's inventory's sha256.

    The version shown is the current one if none is given. `counted` are the requests that this
    server has answered, by version, since the task has its canary. Only its owner sees them, and
    with whom else the task is shared.
    """
    shown = version or task.current
    owned = asker.role is Role.server_admin or asker.tenant == task.tenant
    counts = (counted or {}) if owned else None
    return {
        "name": task.name,
        "object": "task",
        **version_shape(shown, served),
        "tenant": task.tenant,
        "current_version": task.current.version,
        "last_version": task.last_version,
        "labels": dict(task.labels),
        "aliases": dict(task.aliases),
        "canary": None if task.canary is None else _canary_shape(task.canary, counts),
        "shared_with": list(task.shared_with) if owned else [asker.tenant],
        "deleted": None if task.deleted is None else int(task.deleted),
    }


def _canary_shape(canary: Canary, counted: Mapping[int, int] | None) -> Json:
    requests = None
    if counted is not None:
        requests = {str(version): count for version, count in sorted(counted.items())}
    return {"version": canary.version, "share": canary.share, "requests": requests}


def version_shape(version: VersionRecord, served: str) -> Json:
    """One version of a task; `served` is the sha256 of the server's inventory."""
    return {
        "version": version.version,
        "router_sha256": version.router_sha256,
        "size_bytes": version.size_bytes,
        "created": int(version.created),
        "description": version.description,
        "provenance": dict(version.provenance),
        "scores": dict(version.scores),
        "template": version.template,
        "servable": version.inventory_sha256 == served,
    }


def _usage(prepared: PreparedRequest, generated: int, cached: Sequence[int]) -> Json:
    """Token counts; a prompt counts once, however many completions it has.

    `cached` has a number for each choice. Those of one prompt may share what one of them computed:
    the least of them was there before the request.
    """
    first_ones = range(0, len(cached), prepared.n)
    return {
        "prompt_tokens": prepared.prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prepared.prompt_tokens + generated,
        "prompt_tokens_details": {
            "cached_tokens": sum(min(cached[at : at + prepared.n]) for at in first_ones)
        },
    }


class Shape(ABC):
    """How one endpoint renders the pieces of a request's choices."""

    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    @abstractmethod
    def choice(self, index: int, pieces: Sequence[Piece]) -> Json:
        """Render a whole choice."""

    @abstractmethod
    def chunk_choice(self, index: int, piece: Piece, *, first: bool) -> Json:
        """Render one piece of a streamed choice; `first`: it is the first of its choice."""

    def whole(self, prepared: PreparedRequest, pieces: Sequence[Sequence[Piece]]) -> Json:
        """Render the whole response from the pieces of each choice."""
        choices = [self.choice(index, own) for index, own in enumerate(pieces)]
        generated = sum(piece.generated for own in pieces for piece in own)
        envelope = self._envelope(prepared, self.whole_object, choices)
        cached = [own[-1].cached for own in pieces]
        return envelope | {"usage": _usage(prepared, generated, cached)}

    async def stream(
        self,
        prepared: PreparedRequest,
        pieces: AsyncGenerator[tuple[int, Piece], None],
        *,
        include_usage: bool,
    ) -> AsyncGenerator[Json, None]:
        """Render the events of a streamed response, one for each piece that shows something."""
        begun: set[int] = set()
        generated = 0
        cached = [0] * len(prepared.choices)
        counts = {"usage": None} if include_usage else {}
        async with aclosing(pieces):
            async for index, piece in pieces:
                generated += piece.generated
                cached[index] = piece.cached
                if piece.text or piece.tokens or piece.finish_reason is not None:
                    choice = self.chunk_choice(index, piece, first=index not in begun)
                    begun.add(index)
                    yield self._envelope(prepared, self.chunk_object, [choice]) | counts
        if include_usage:
            last = self._envelope(prepared, self.chunk_object, [])
            yield last | {"usage": _usage(prepared, generated, cached)}

    def _envelope(self, prepared: PreparedRequest, kind: str, choices: Sequence[Json]) -> Json:
        return {
            "id": prepared.id,
            "object": kind,
            "created": prepared.created,
            "model": prepared.model,
            "system_fingerprint": _fingerprint(prepared),
            "choices": list(choices),
        }


class CompletionShape(Shape):
    """Responses of POST /v1/completions."""

    whole_object = chunk_object = "text_completion"

    def choice(self, index: int, pieces: Sequence[Piece]) -> Json:
        return self._choice(index, _joined(pieces))

    def chunk_choice(self, index: int, piece: Piece, *, first: bool) -> Json:
        return self._choice(index, piece)

    def _choice(self, index: int, piece: Piece) -> Json:
        return {
            "index": index,
            "text": piece.text,
            "logprobs": _completion_logprobs(piece.tokens) if piece.tokens else None,
            "finish_reason": piece.finish_reason,
        }


class ChatShape(Shape):
    """Responses of POST /v1/chat/completions."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, index: int, pieces: Sequence[Piece]) -> Json:
        piece = _joined(pieces)
        return {
            "index": index,
            "message": {"role": "assistant", "content": piece.text},
            "logprobs": _chat_logprobs(piece.tokens) if piece.tokens else None,
            "finish_reason": piece.finish_reason,
        }

    def chunk_choice(self, index: int, piece: Piece, *, first: bool) -> Json:
        role = {"role": "assistant"} if first else {}
        return {
            "index": index,
            "delta": role | {"content": piece.text},
            "logprobs": _chat_logprobs(piece.tokens) if piece.tokens else None,
            "finish_reason": piece.finish_reason,
        }


def _fingerprint(prepared: PreparedRequest) -> str | None:
    """Which task version answers, for OpenAI's field system_fingerprint."""
    if prepared.task is None:
        return None
    info = prepared.task.info
    return f"{info.name}@{info.version}:{info.router_sha256[:12]}"


def _joined(pieces: Sequence[Piece]) -> Piece:
    return Piece(
        text="".join(piece.text for piece in pieces),
        tokens=tuple(token for piece in pieces for token in piece.tokens),
        finish_reason=pieces[-1].finish_reason,
    )


def _completion_logprobs(tokens: Sequence[TextToken]) -> Json:
    def top(token: TextToken) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        # Several tokens can have the same text: the likeliest of them is shown.
        return {text: _finite(logprob) for text, logprob in reversed(token.top)}

    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [
            None if token.logprob is None else _finite(token.logprob) for token in tokens
        ],
        "top_logprobs": [top(token) for token in tokens] if any(t.top for t in tokens) else None,
        "text_offset": [token.offset for token in tokens],
    }


def _chat_logprobs(tokens: Sequence[TextToken]) -> Json:
    def entry(text: str, logprob: float) -> Json:
        # The text of a partial character does not tell its bytes.
        known = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": known}

    return {
        "content": [
            entry(token.text, token.logprob or 0.0)
            | {"top_logprobs": [entry(text, logprob) for text, logprob in token.top]}
            for token in tokens
        ]
    }


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
