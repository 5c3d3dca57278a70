"""Converts between text and token ids: tokenizer, chat template, decoding, stop strings.

All of this is the same for every engine. Encoding and template rendering can be slow and run off
the event loop; decoding takes microseconds per token and runs on it.
"""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from polyrex.server.errors import InvalidRequest

_CONTEXT = 4
"""How many tokens before a text can change how its first token decodes (a leading space, a
character that began in the prompt)."""
_UNFINISHED = "\ufffd"
"""An unfinished UTF-8 character decodes to this: once, or once per byte, so up to three times."""
_CHARACTERS = 8
"""A token has fewer characters on the average, in any text that means something."""
_LEAST_LOOK = 1 << 14  # characters
_DOUBTFUL = 64
"""Tokens at a cut in a text that may not be tokens of the whole text."""


class Tokenizer:
    """The base model's tokenizer, safe to call from several threads at once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # The Rust tokenizer itself: transformers' wrapper changes its settings on every call.
        self._backend = tokenizer.backend_tokenizer
        self._wrapper = tokenizer
        self.vocabulary_size = len(tokenizer)
        added = self._backend.get_added_tokens_decoder().values()
        self._doubtful = _DOUBTFUL + max((len(token.content) for token in added), default=0)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Encode a text, with the special tokens that the model expects around it if `special`."""
        # A batch, of one: that lets other threads run meanwhile.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=special)
        ids: list[int] = encoding.ids
        return ids

    def exceeds(self, text: str, most: int) -> bool:
        """Whether a text certainly has more than `most` tokens, without encoding much more of it.

        Never true of a text that has no more. False may be wrong, where a single word is as long as
        thousands of tokens.
        """
        size = ordinary_length(most)
        while size < len(text):
            if self._certain(text[:size]) > most:
                return True
            size *= 4
        return False

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """A chat in the model's own template, up to where the assistant answers."""
        try:
            text = self._wrapper.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise InvalidRequest(
                f"the chat template refuses these messages: {error!s:.200}", "messages"
            ) from error
        except ValueError as error:
            raise InvalidRequest("the base model has no chat template", "messages") from error
        assert isinstance(text, str)
        return text

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Decode token ids; special tokens are left out unless asked for."""
        text: str = self._backend.decode(ids, skip_special_tokens=not special)
        return text

    def _certain(self, begin: str) -> int:
        """How many tokens a text has at least that begins like this.

        Tokenizers split a text into words, from its beginning on, before they look for tokens. So
        all words but the last are those of the whole text: that one may go on, and a little more
        may depend on what follows, such as white space, or what begins like an added token.
        """
        (encoding,) = self._backend.encode_batch([begin], add_special_tokens=False)
        words = encoding.word_ids
        return len(words) - words.count(words[-1]) - self._doubtful if words else 0


def ordinary_length(tokens: int) -> int:
    """Characters of a text that may well have so many tokens; a longer one probably has more."""
    return max(_LEAST_LOOK, _CHARACTERS * tokens)


class IncrementalDecoder:
    """Decodes tokens one by one and never yields part of a UTF-8 character.

    tokenizers.DecodeStream does not replace it: it repeats the text before a character that began
    in the prompt, and holds bytes that are not UTF-8 back for ever.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before[-_CONTEXT:])
        self._shown = len(_finished(tokenizer.decode(self._ids)))

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
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
    """Cuts a text before its first stop string, and holds back what may yet become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text; return what can be shown now. `stopped` tells whether the text ends there."""
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
        """Return what was held back, once nothing more follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
