"""The JSON of responses, whole and streamed, in OpenAI's two shapes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from polyrex.server.requests.generation import Piece, TextToken
from polyrex.server.requests.prepare import Plan

Json = dict[str, Any]

LEAST_LOGPROB = -9999.0
"""What a probability of 0 is shown as: JSON has no infinity."""


def usage(plan: Plan, generated: int) -> Json:
    """Token counts; a prompt counts once, however many completions it has."""
    return {
        "prompt_tokens": plan.prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": plan.prompt_tokens + generated,
    }


class Shape(ABC):
    """How one endpoint writes the pieces of a plan's choices."""

    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    @abstractmethod
    def choice(self, index: int, pieces: Sequence[Piece]) -> Json:
        """A whole choice."""

    @abstractmethod
    def chunk_choice(self, index: int, piece: Piece, *, first: bool) -> Json:
        """A piece of a choice in a stream; `first` of its choice."""

    def whole(self, plan: Plan, pieces: Sequence[Sequence[Piece]]) -> Json:
        """The response; `pieces` of every choice."""
        choices = [self.choice(index, own) for index, own in enumerate(pieces)]
        generated = sum(piece.generated for own in pieces for piece in own)
        return self._envelope(plan, self.whole_object, choices) | {"usage": usage(plan, generated)}

    def chunk(self, plan: Plan, choices: Sequence[Json]) -> Json:
        """One event of a stream."""
        return self._envelope(plan, self.chunk_object, choices)

    def _envelope(self, plan: Plan, kind: str, choices: Sequence[Json]) -> Json:
        return {
            "id": plan.id,
            "object": kind,
            "created": plan.created,
            "model": plan.model,
            "system_fingerprint": plan.fingerprint,
            "choices": list(choices),
        }


class CompletionShape(Shape):
    """POST /v1/completions."""

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
    """POST /v1/chat/completions."""

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
        # Different tokens can have one text: the likeliest of them stands for it.
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
        # The bytes of a part of a character are not known from its text.
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
