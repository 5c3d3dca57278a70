"""Between text and token ids: the base model's tokenizer and chat template, and stop strings.

Everything here is the same for every engine. Encoding and rendering may take long and are called
off the event loop; decoding takes microseconds a token and is called on it.
"""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from polyrex.server.errors import InvalidRequest

_CONTEXT = 4
"""Tokens before a text that can change how its first token decodes (a leading space, a character
begun in the prompt)."""
_UNFINISHED = "\ufffd"
"""What an unfinished UTF-8 character decodes to: once, or once a byte, so up to three of them."""


class Tokenizer:
    """The base model's tokenizer, safe to call from several threads at once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # The Rust tokenizer alone: transformers' wrapper changes its settings in every call.
        self._backend = tokenizer.backend_tokenizer
        self._wrapper = tokenizer
        self.vocabulary_size = len(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the model wants around it."""
        ids: list[int] = self._backend.encode(text).ids
        return ids

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a chat in the model's own template, up to where the assistant answers."""
        try:
            text = self._wrapper.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise InvalidRequest(
                f"the chat template refuses these messages: {error}", "messages"
            ) from error
        except ValueError as error:
            raise InvalidRequest("the base model has no chat template", "messages") from error
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of token ids; special tokens are left out unless asked for."""
        text: str = self._backend.decode(ids, skip_special_tokens=not special)
        return text


class IncrementalDecoder:
    """Turns tokens into text one by one, never a part of a UTF-8 character."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before[-_CONTEXT:])
        self._shown = len(_finished(tokenizer.decode(self._ids)))

    def push(self, token: int) -> str:
        """The text that has become certain with this token."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        certain = _finished(text)
        new = certain[self._shown :]
        self._shown += len(new)
        if len(certain) == len(text) and len(self._ids) > 2 * _CONTEXT:
            self._ids = self._ids[-_CONTEXT:]
            self._shown = len(_finished(self._tokenizer.decode(self._ids)))
        return new


def _finished(text: str) -> str:
    trailing = len(text) - len(text.rstrip(_UNFINISHED))
    return text[: len(text) - min(trailing, 3)]


class StopScanner:
    """Ends a text before the first stop string, and holds back what may yet become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What of the text so far can be shown now; `stopped` tells whether it ends there."""
        held = self._held + text
        found = [at for at in (held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return held[: min(found)]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, without being all of it."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
