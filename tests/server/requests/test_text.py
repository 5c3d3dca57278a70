"""Incremental decoding and stop strings, against the whole text."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from polyrex.server.requests.text import IncrementalDecoder, StopScanner, Tokenizer, ordinary_length

TEXTS = [
    "plain words, and more of them",
    "né 😀 字 🏳️‍🌈 end",
    "  spaces \n\n and\ttabs ",
    "😀" * 20,
    "日本語のテキスト",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ours = Tokenizer(tokenizer)
    decoder = IncrementalDecoder(ours)
    assert "".join(decoder.push(token) for token in ours.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_holds_a_part_of_a_character(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    ours = Tokenizer(tokenizer)
    decoder = IncrementalDecoder(ours)
    assert not any("\ufffd" in decoder.push(token) for token in ours.encode(text))


def test_a_character_begun_in_the_prompt_is_ended(tokenizer: PreTrainedTokenizerBase) -> None:
    ours = Tokenizer(tokenizer)
    *prompt, last = ours.encode("a 字")
    assert ours.decode(prompt).endswith("\ufffd")
    assert IncrementalDecoder(ours, prompt).push(last) == "字"


def cut(text: str, stops: list[str]) -> str:
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]


@given(
    st.lists(st.text("ab", max_size=3), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_text_is_cut_before_the_stop_string_that_ends_first(
    pieces: list[str], stops: list[str]
) -> None:
    scanner = StopScanner(stops)
    shown = ""
    seen = ""
    for piece in pieces:
        shown += scanner.push(piece)
        seen += piece
        if scanner.stopped:
            break
    assert scanner.stopped == any(stop in seen for stop in stops)
    assert shown + scanner.flush() == cut(seen, stops)


def test_nothing_is_held_back_without_need() -> None:
    scanner = StopScanner(["END"])
    assert scanner.push("some text E") == "some text "
    assert scanner.push("lse") == "Else"


LONG = {
    "words": "internationalization and a little more. " * 2000,
    "spaces": " " * 60_000,
    "spaces and a word": " " * 60_000 + "x",
    "lines": "  \n\n  \n" * 10_000,
    "tokens of their own": "<|im_start|>" * 6000,
    "one word": "ab" * 40_000,
    "no word of any language": "\u0378\U0001f600e\u0301" * 20_000,
    "numbers": "3141592653 " * 8000,
}
"""Texts whose tokens are few for their length, and texts that look otherwise where they are cut."""


@pytest.mark.parametrize("name", LONG)
def test_a_text_that_fits_is_never_taken_for_one_that_does_not(
    tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    ours = Tokenizer(tokenizer)
    text = LONG[name]
    assert not ours.exceeds(text, len(ours.encode(text, special=False)))


@pytest.mark.parametrize(
    "ending",
    ["<|im_start|>", "  \n \n\n x", "internationalization", "don't've", "e\u0301\u0323", "314159"],
)
def test_nor_is_one_that_is_cut_where_its_tokens_change(
    tokenizer: PreTrainedTokenizerBase, ending: str
) -> None:
    ours = Tokenizer(tokenizer)
    for cut in range(1, len(ending)):
        text = " " * (ordinary_length(0) - cut) + ending
        tokens = len(ours.encode(text, special=False))
        assert ordinary_length(tokens) < len(text)  # it is looked at
        assert not ours.exceeds(text, tokens)


def simple(model: models.Model, **parts: Any) -> Tokenizer:
    """A tokenizer with a model, a normalizer, a pre_tokenizer."""
    backend = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(backend, name, part)
    wrapper = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")  # type: ignore[no-untyped-call]
    return Tokenizer(wrapper)


UNKNOWN = models.BPE({"?": 0, "a": 1}, [], unk_token="?", fuse_unk=True)
WORDS = models.WordLevel({"?": 0, "a": 1}, unk_token="?")


@pytest.mark.parametrize(
    "ours",
    [
        simple(UNKNOWN),
        simple(UNKNOWN, pre_tokenizer=pre_tokenizers.Metaspace()),
        simple(WORDS, pre_tokenizer=pre_tokenizers.Whitespace()),
        simple(WORDS, pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
        simple(WORDS, normalizer=normalizers.Strip(), pre_tokenizer=pre_tokenizers.Punctuation()),
        simple(WORDS, normalizer=normalizers.Replace(Regex(" +"), " ")),
    ],
    ids=range(6),
)
@pytest.mark.parametrize("text", [" " * 40_000, "é" * 40_000 + " a", "a" + "  \n" * 20_000 + "a"])
def test_that_holds_for_tokenizers_that_make_little_of_much_text(
    ours: Tokenizer, text: str
) -> None:
    assert not ours.exceeds(text, len(ours.encode(text, special=False)))


@pytest.mark.parametrize(("most", "looked_at"), [(10, 16_384), (4000, 32_000)])
def test_of_a_text_that_is_far_too_long_only_the_beginning_is_encoded(
    tokenizer: PreTrainedTokenizerBase, most: int, looked_at: int
) -> None:
    lengths = []

    class Noting(Tokenizer):
        def _certain(self, begin: str) -> int:
            lengths.append(len(begin))
            return super()._certain(begin)

    assert Noting(tokenizer).exceeds("some words " * 100_000, most)
    assert lengths == [looked_at]


def test_an_event_loop_goes_on_while_a_text_is_encoded(tokenizer: PreTrainedTokenizerBase) -> None:
    ours = Tokenizer(tokenizer)
    encoding = threading.Thread(target=ours.encode, args=(LONG["words"] * 10,))
    encoding.start()
    turns = 0
    while encoding.is_alive():
        turns += 1
        time.sleep(0)
    # With the interpreter to itself, the other thread would leave us a handful.
    assert turns > 50
