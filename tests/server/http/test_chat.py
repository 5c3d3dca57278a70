"""POST /v1/chat/completions over a fake engine."""

from __future__ import annotations

import json

import httpx
from transformers import PreTrainedTokenizerBase

from support.fake_server import Served

from .test_completions import events

PATH = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "Why?"}]


def chat(served: Served, **body: object) -> httpx.Response:
    return served.client.post(PATH, json={"messages": QUESTION, "max_tokens": 2, **body})


def test_a_chat_completion_has_openais_shape(served: Served) -> None:
    answer = chat(served).json()
    assert answer["object"] == "chat.completion"
    message = {"role": "assistant", "content": ",-"}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}
    assert answer["choices"] == [choice]


def test_the_prompt_is_the_models_own_template(
    served: Served, tokenizer: PreTrainedTokenizerBase
) -> None:
    chat(served, messages=[{"role": "system", "content": "Be brief."}, *QUESTION])
    prompt = tokenizer.decode(list(served.engine.requests[0].prompt))
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_content_may_come_in_parts(served: Served, tokenizer: PreTrainedTokenizerBase) -> None:
    parts = [{"type": "text", "text": "first"}, {"type": "text", "text": "second"}]
    chat(served, messages=[{"role": "user", "content": parts}])
    assert "first\nsecond<|im_end|>" in tokenizer.decode(list(served.engine.requests[0].prompt))


def test_without_max_tokens_the_context_is_the_limit(served: Served) -> None:
    served.client.post(PATH, json={"messages": QUESTION})
    request = served.engine.requests[0]
    assert len(request.prompt) + request.sampling.max_tokens == served.engine.context_length


def test_max_completion_tokens_is_max_tokens(served: Served) -> None:
    served.client.post(PATH, json={"messages": QUESTION, "max_completion_tokens": 5})
    assert served.engine.requests[0].sampling.max_tokens == 5


def test_logprobs_have_chats_own_shape(served: Served) -> None:
    logprobs = chat(served, max_tokens=1, logprobs=True, top_logprobs=1).json()["choices"][0]
    entry = {"token": ",", "logprob": -0.25, "bytes": [44]}
    assert logprobs["logprobs"] == {"content": [entry | {"top_logprobs": [entry]}]}


def test_a_stream_begins_with_the_role_and_ends_with_a_reason(served: Served) -> None:
    *chunks, done = events(served, PATH, messages=QUESTION, max_tokens=2)
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    assert [c["delta"] for c in choices] == [
        {"role": "assistant", "content": ","},
        {"content": "-"},
        {"content": ""},
    ]
    assert choices[-1]["finish_reason"] == "length"
    assert done == "[DONE]"
