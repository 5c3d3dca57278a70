"""POST /v1/completions over a fake engine: how tokens become a response."""

from __future__ import annotations

import json

import pytest
from transformers import PreTrainedTokenizerBase

from support.fake_server import FakeEngine, Serve, Served

EMOJI = "né 😀 字 end"


def replying(tokenizer: PreTrainedTokenizerBase, text: str) -> FakeEngine:
    """An engine that replies with this text and ends."""
    return FakeEngine(reply=tuple(tokenizer.encode(text)), eos=True)


def usage(*, prompt: int, completion: int, cached: int = 0) -> dict[str, object]:
    """Token counts as a response shows them."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def test_a_completion_has_openais_shape(served: Served) -> None:
    answer = served.complete(max_tokens=3).json()
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["model"] == "base"
    choice = {"index": 0, "text": ",-.", "logprobs": None, "finish_reason": "length"}
    assert answer["choices"] == [choice]
    assert answer["usage"] == usage(prompt=1, completion=3)


def test_max_tokens_is_16_unless_told(served: Served) -> None:
    assert served.complete().json()["usage"]["completion_tokens"] == 16


def test_sampling_parameters_reach_the_engine(served: Served) -> None:
    served.complete(temperature=0.5, top_p=0.25, seed=7, logprobs=2, max_tokens=1)
    sampling = served.engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.5, 0.25, 7)
    assert (sampling.logprobs, sampling.max_tokens) == (2, 1)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Hello", [(19556,)]),
        (["Hello", "Hello world"], [(19556,), (19556, 905)]),
        ([5, 6], [(5, 6)]),
        ([[5], [6, 7]], [(5,), (6, 7)]),
    ],
)
def test_prompts_come_as_text_or_ids_one_or_many(
    served: Served, prompt: object, expected: list[tuple[int, ...]]
) -> None:
    answer = served.complete(prompt=prompt, max_tokens=1).json()
    assert sorted(r.prompt for r in served.engine.requests) == sorted(expected)
    assert [c["index"] for c in answer["choices"]] == list(range(len(expected)))


def test_n_choices_of_a_seed_have_seeds_of_their_own(served: Served) -> None:
    answer = served.complete(prompt=["a", "b"], n=2, seed=10, max_tokens=1).json()
    assert sorted(r.sampling.seed or 0 for r in served.engine.requests) == [10, 10, 11, 11]
    assert answer["usage"] == usage(prompt=2, completion=4)


def test_a_null_field_counts_as_not_given(served: Served) -> None:
    answer = served.complete(temperature=None, stop=None, max_tokens=None)
    assert answer.json()["usage"]["completion_tokens"] == 16


def test_text_ends_before_a_stop_string(serve: Serve, tokenizer: PreTrainedTokenizerBase) -> None:
    served = serve(replying(tokenizer, "one two three four"))
    choice = served.complete(stop=["xx", "o th"]).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("one tw", "stop")


def test_a_stop_string_aborts_the_request_in_the_engine(served: Served) -> None:
    served.complete(max_tokens=200, stop="-")
    assert len(served.engine.aborted) == 1


def test_what_only_looks_like_a_stop_string_is_shown_in_the_end(
    serve: Serve, tokenizer: PreTrainedTokenizerBase
) -> None:
    served = serve(replying(tokenizer, "one two"))
    assert served.complete(stop="two!").json()["choices"][0]["text"] == "one two"


def test_echo_repeats_the_prompt(served: Served) -> None:
    answer = served.complete(echo=True, max_tokens=2).json()
    assert answer["choices"][0]["text"] == "Hello,-"


def test_echo_with_logprobs_scores_the_prompt(served: Served) -> None:
    answer = served.complete(prompt="Hello world", echo=True, max_tokens=1, logprobs=1).json()
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["Hello", " world", ","]
    assert logprobs["token_logprobs"] == [None, -0.25, -0.25]
    assert logprobs["top_logprobs"] == [None, {" world": -0.25}, {",": -0.25}]
    assert logprobs["text_offset"] == [0, 5, 11]


def test_echo_without_tokens_scores_the_prompt_alone(served: Served) -> None:
    answer = served.complete(prompt="Hello world", echo=True, max_tokens=0, logprobs=0).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("Hello world", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -0.25]
    assert answer["usage"]["completion_tokens"] == 0


def test_logprobs_end_with_the_text(serve: Serve, tokenizer: PreTrainedTokenizerBase) -> None:
    served = serve(replying(tokenizer, "one two three four"))
    choice = served.complete(stop="three", logprobs=0).json()["choices"][0]
    assert choice["text"] == "one two "
    assert choice["logprobs"]["tokens"] == ["one", " two", " three"]  # its space is in the text


def test_a_probability_of_zero_is_a_number_in_json(serve: Serve) -> None:
    answer = serve(FakeEngine(impossible=True)).complete(max_tokens=1, logprobs=1)
    assert answer.json()["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


def events(served: Served, path: str = "/v1/completions", **body: object) -> list[str]:
    """The data of every event of a stream."""
    request = {"stream": True, **body}
    with served.client.stream("POST", path, json=request) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return [line.removeprefix("data: ") for line in response.iter_lines() if line]


def test_a_stream_says_the_same_as_a_whole_answer(
    serve: Serve, tokenizer: PreTrainedTokenizerBase
) -> None:
    served = serve(replying(tokenizer, EMOJI))
    whole = served.complete(max_tokens=50).json()["choices"][0]
    *chunks, done = events(served, prompt="Hello", max_tokens=50)
    assert done == "[DONE]"
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    assert "".join(c["text"] for c in choices) == whole["text"] == EMOJI
    assert [c["finish_reason"] for c in choices[-2:]] == [None, "stop"]


def test_a_stream_never_holds_a_part_of_a_character(
    serve: Serve, tokenizer: PreTrainedTokenizerBase
) -> None:
    served = serve(replying(tokenizer, EMOJI))
    assert not any("\ufffd" in event for event in events(served, prompt="x", max_tokens=50))


def test_a_stream_holds_back_what_may_become_a_stop_string(
    serve: Serve, tokenizer: PreTrainedTokenizerBase
) -> None:
    served = serve(replying(tokenizer, "one two three"))
    *chunks, _ = events(served, prompt="x", stop=[" two three"])
    texts = [json.loads(chunk)["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == "one"


def test_a_stream_counts_tokens_where_asked(served: Served) -> None:
    options = {"include_usage": True}
    *chunks, last, _ = events(served, prompt="Hello", max_tokens=3, stream_options=options)
    assert all(json.loads(chunk)["usage"] is None for chunk in chunks)
    expected = usage(prompt=1, completion=3)
    assert (json.loads(last)["choices"], json.loads(last)["usage"]) == ([], expected)


def test_a_streams_choices_come_at_the_same_time(served: Served) -> None:
    *chunks, _ = events(served, prompt="Hello", n=2, max_tokens=5)
    order = [json.loads(chunk)["choices"][0]["index"] for chunk in chunks]
    assert set(order[:4]) == {0, 1}
    assert sorted(order) == [0] * 6 + [1] * 6
