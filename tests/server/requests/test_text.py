"""Incremental decoding and stop strings, against the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from polyrex.server.requests.text import IncrementalDecoder, StopScanner, Tokenizer

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
