"""Requests that have crashed, hung or bled servers like ours, or might: the table of both engines.

Each must get a 4xx or a good answer, and nothing else may notice it. The names say where a poison
comes from: a field and its value, or what is wrong with the body. Values are spelled in JSON, since
Python's own writer cannot spell some of them.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

VOCABULARY = 500  # of the small model

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Poison:
    """One request."""

    name: str
    body: bytes
    path: str = COMPLETIONS
    headers: Mapping[str, str] = field(default_factory=lambda: JSON)


NUMBERS = (
    *("-1", "0", "1", "9", "-0.0", "1.5", "1e-300", "1e308", "1e999", "-1e999", "NaN", "Infinity"),
    *("-Infinity", "2147483648", "9223372036854775808", "-9223372036854775809", "1" + "0" * 30),
    *("1" * 400, "true", "false", "null", '"3"', '""', "[]", "[1]", "{}"),
)
NUMERIC_FIELDS = (
    *("n", "best_of", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "temperature"),
    *("top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "length_penalty", "priority", "truncate_prompt_tokens"),
)
"""Those of OpenAI's and of vLLM's schema that are numbers."""

FOREIGN: Mapping[str, Sequence[str]] = {
    "logit_bias": (
        '{"-1": 1}',
        '{"0": 1e9}',
        '{"500": 100}',
        '{"99999999": -100}',
        '{"x": 1}',
        '{"1": NaN}',
        '{"1": null}',
        "[[1, 2]]",
        "1",
    ),
    "logprob_token_ids": ("[-1]", "[500]", "[99999999999]", "[]"),
    "allowed_token_ids": ("[-1]", "[500]", "[]", "[0]"),
    "bad_words": ('[""]', '["\\u0000"]', '["a"]'),
    "stop_token_ids": ("[-1]", "[500]", "[1e9]", '["a"]'),
    "stop": (
        "[]",
        '[""]',
        '""',
        "[1]",
        "[null]",
        '["a","b","c","d","e"]',
        '{"a": 1}',
        '["\\u0000"]',
        json.dumps("x" * 257),
        json.dumps(["x" * 256] * 4),
        json.dumps(["\\"] * 4),
        '"\\ud800"',
    ),
    "chat_template": (
        '"{{ 7 * 7 }}"',
        "\"{{ ''.__class__.__mro__[1].__subclasses__() }}\"",
        '"{% for i in range(10**9) %}x{% endfor %}"',
        "\"{% include '/etc/passwd' %}\"",
    ),
    "chat_template_kwargs": ('{"tokenize": true}', '{"chat_template": "x"}', '{"tools": [{}]}'),
    "kv_transfer_params": ('{"do_remote_prefill": true, "remote_host": "127.0.0.1"}', "{}", "[]"),
    "prompt_embeds": ('"gASVAAAAAA=="', '"UEsDBBQAAAAI"', "[]", '["AAAA"]', '""'),
    "cache_salt": ('""', json.dumps("s" * 257), "1", "[]", '"\\u0000"', '"\\udfff"'),
    "user": (json.dumps("u" * 100_000), "1", '"\\ud800"', '"\\u0000"'),
    "request_id": ('"same"', json.dumps("i" * 100_000), "1", '"a\\nb"'),
    "response_format": (
        '{"type": "json_object"}',
        '{"type": "json_schema", "json_schema": {}}',
        '{"type": "structural_tag", "format": {"type": "dispatch"}}',
    ),
    "guided_json": ('{"type": "object"}', '{"$ref": "#"}', '"{"', '{"type": "nothing"}'),
    "guided_regex": ('"(a+)+$"', '"["', '"(?R)"', json.dumps("(" * 5000)),
    "guided_grammar": ('"root ::= root"', '""'),
    "guided_choice": ("[]", '["a", 1]'),
    "guided_decoding_backend": ('"outlines"', '"xgrammar:disable-any-whitespace"'),
    "structured_outputs": ('{"regex": "(a*)*b"}', '{"json": {"$ref": "http://127.0.0.1/"}}'),
    "tools": (
        '[{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#"}}}]',
        "[]",
    ),
    "tool_choice": ('"required"', '{"type": "function", "function": {"name": "f"}}'),
    "mm_processor_kwargs": ('{"num_crops": 100000000}', "{}"),
    "media_io_kwargs": ('{"video": {"num_frames": -1}}',),
    "lora_request": ('{"path": "/etc"}', "1"),
    "extra_body": ('{"chat_template": "x", "n": 1000000000}',),
    "vllm_xargs": ('{"a": 1}', '{"a": [1, 2]}'),
    "stream_options": ('{"include_usage": true}', '{"continuous_usage_stats": true}', "[]", "1"),
    "echo": ("true", '"yes"', "1"),
    "suffix": ('"x"', "1", '""'),
    "use_beam_search": ("true",),
    "skip_special_tokens": ("false",),
    "return_tokens_as_token_ids": ("true",),
    "detokenize": ("false",),
    "bootstrap_host": ('"169.254.169.254"',),
    "__proto__": ('{"admin": true}',),
    "model": ('"../../etc/passwd"', '"a%00b"', json.dumps("m" * 100_000), "1", "[]", '"\\ud800"'),
    "task": (
        '"nobody"',
        '"../x"',
        '"a@999999999999"',
        '"@"',
        '":"',
        '"\\u0000"',
        "{}",
        json.dumps("t" * 100000),
        '"' + "٣" * 40 + '"',
        '"x@-1"',
    ),
    "intuition": ('"prompt"', '"x"', "1"),
}

PROMPTS: Mapping[str, str] = {
    "negative id": "[-1]",
    "last id": f"[{VOCABULARY - 1}]",
    "id past the vocabulary": f"[{VOCABULARY}]",
    "id of 32 bits": "[4294967296]",
    "id of 64 bits": "[9223372036854775808]",
    "id of 100 digits": f"[{'9' * 100}]",
    "id that is a fraction": "[1.5]",
    "id that is true": "[true]",
    "id that is text": '[1, "1"]',
    "id that is null": "[1, null]",
    "no ids": "[]",
    "no prompts": "[[]]",
    "33 prompts": json.dumps([[1]] * 33),
    "100,000 prompts of text": json.dumps(["a"] * 100_000),
    "100,000 prompts of ids": json.dumps([[1]] * 100_000),
    "text and ids": '["a", [1]]',
    "ids three deep": "[[[1]]]",
    "object": '{"prompt_token_ids": [1]}',
    "more ids than the context": json.dumps([1] * 100_000),
    "just as many as the context": json.dumps([1] * 512),
    "negative ids": json.dumps([-1] * 100_000),
    "number": "1",
    "empty text": '""',
    "spaces": json.dumps(" " * 1000),
    "long text": json.dumps("1 " * 100_000),
    "text without an end": json.dumps("x" * 500_000),
    "half a surrogate pair": '"\\ud800"',
    "the other half": '"a\\udc00b"',
    "NUL": '"\\u0000"',
    "special tokens": '"<|im_start|>system\\n<|im_end|><|endoftext|>"',
    "combining": json.dumps("a" + "\u0301" * 2000),
    "from right to left": json.dumps("\u202eabc\u2066"),
    "beyond the first plane": json.dumps("\U0001f469\u200d\U0001f680" * 500),
    "not a character": '"\\uffff\\ufffe"',
}

MESSAGES: Mapping[str, str] = {
    "none": "[]",
    "1025": json.dumps([{"role": "user", "content": "1"}] * 1025),
    "no role": '[{"content": "1"}]',
    "another role": '[{"role": "tool", "content": "1", "tool_call_id": "x"}]',
    "developer": '[{"role": "developer", "content": "1"}]',
    "content is null": '[{"role": "user", "content": null}]',
    "content is a number": '[{"role": "user", "content": 1}]',
    "no parts": '[{"role": "user", "content": []}]',
    "picture": '[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": '
    '"file:///etc/passwd"}}]}]',
    "video": '[{"role": "user", "content": [{"type": "video_url", "video_url": {"url": '
    '"http://169.254.169.254/"}}]}]',
    "sound": '[{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": '
    '"AA"}}]}]',
    "parts that are empty": json.dumps([{"role": "user", "content": [{}] * 20_000}]),
    "parts that are numbers": json.dumps([{"role": "user", "content": [1] * 50_000}]),
    "call of a tool": '[{"role": "assistant", "content": "1", "tool_calls": [{"function": '
    '{"arguments": "{"}}]}]',
    "template in the content": '[{"role": "user", "content": "{{ config }}{% raw %}"}]',
    "an object": '{"role": "user"}',
    "text": '"hello"',
    "prefix": '[{"role": "assistant", "content": "1", "prefix": true}]',
}

BODIES: Mapping[str, bytes] = {
    "nothing": b"",
    "null": b"null",
    "list": b"[]",
    "text": b'"prompt"',
    "number": b"1",
    "half": b'{"prompt": "1"',
    "more behind it": b'{"prompt": "1"} {}',
    "one key twice": b'{"prompt": "1", "max_tokens": 1, "max_tokens": 2}',
    "comment": b'{"prompt": "1" /* one */}',
    "single quotes": b"{'prompt': '1'}",
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "overlong UTF-8": b'{"prompt": "\xc0\xaf"}',
    "UTF-16": '{"prompt": "1"}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"prompt": "1"}',
    "lists 100,000 deep": b'{"prompt": ' + b"[" * 100_000,
    "lists 100,000 deep, closed": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "objects 20,000 deep": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "50,000 unknown keys": json.dumps(dict.fromkeys(map(str, range(50_000)))).encode(),
    "one long key": json.dumps({"k" * 500_000: 1}).encode(),
    "number of 100,000 digits": b'{"prompt": "1", "seed": ' + b"7" * 100_000 + b"}",
    "exponent": b'{"prompt": "1", "temperature": 1e' + b"9" * 1000 + b"}",
    "escapes": b'{"prompt": "' + rb"\u0041" * 50_000 + b'"}',
    "control character": b'{"prompt": "\x01"}',
    "pickle": b"\x80\x04\x95\x00\x00.",
}

HEADERS: Mapping[str, Mapping[str, str]] = {
    "text/plain": {"content-type": "text/plain"},
    "form": {"content-type": "application/x-www-form-urlencoded"},
    "several parts": {"content-type": "multipart/form-data; boundary=x"},
    "another charset": {"content-type": "application/json; charset=utf-7"},
    "request id of 65": JSON | {"x-request-id": "i" * 65},
    "request id of 10,000": JSON | {"x-request-id": "i" * 10_000},
    "request id with spaces": JSON | {"x-request-id": "a b"},
    "request id of others": JSON | {"x-request-id": "same"},
    "request id of nothing": JSON | {"x-request-id": ""},
    "trace that is none": JSON | {"traceparent": "00-zz-zz-zz"},
    "timeout of less than nothing": JSON | {"x-polyrex-timeout": "-1"},
    "timeout that is no number": JSON | {"x-polyrex-timeout": "NaN"},
    "timeout without end": JSON | {"x-polyrex-timeout": "1e999"},
    "Envoy's timeout": JSON | {"x-envoy-expected-rq-timeout-ms": "-5"},
    "revision that is no number": JSON | {"x-polyrex-min-revision": "x"},
    "revision of less than nothing": JSON | {"x-polyrex-min-revision": "-1"},
    "vLLM's data-parallel rank": JSON | {"x-data-parallel-rank": "999999"},
    "another method": JSON | {"x-http-method-override": "DELETE"},
    "another Host": JSON | {"x-forwarded-host": "evil.example"},
}


def poisons() -> list[Poison]:
    """The whole table."""
    return [*_fields(), *_prompts(), *_bodies()]


def _fields() -> Iterator[Poison]:
    values: dict[str, Sequence[str]] = {**dict.fromkeys(NUMERIC_FIELDS, NUMBERS), **FOREIGN}
    for name, spelled in values.items():
        prompt = "" if name in ("prompt", "messages") else '"prompt": [1, 2], '
        for value in spelled:
            limit = "" if name == "max_tokens" else '"max_tokens": 4, '
            body = f'{{{prompt}{limit}"{name}": {value}}}'
            yield Poison(f"{name}: {value[:40]}", body.encode())
    messages = '"messages": [{"role": "user", "content": "1 2"}]'
    for name in ("top_logprobs", "max_completion_tokens", "logprobs"):
        for value in NUMBERS:
            limit = "" if name == "max_completion_tokens" else '"max_tokens": 4, '
            body = f'{{{messages}, {limit}"{name}": {value}}}'
            yield Poison(f"chat, {name}: {value[:40]}", body.encode(), CHAT)
    for name in ("chat_template", "chat_template_kwargs", "tools", "response_format"):
        for value in FOREIGN[name]:
            body = f'{{{messages}, "max_tokens": 4, "{name}": {value}}}'
            yield Poison(f"chat, {name}: {value[:40]}", body.encode(), CHAT)


def _prompts() -> Iterator[Poison]:
    for name, value in PROMPTS.items():
        yield Poison(f"prompt: {name}", f'{{"max_tokens": 2, "prompt": {value}}}'.encode())
        body = f'{{"max_tokens": 1, "prompt": {value}, "echo": true, "logprobs": 20}}'
        yield Poison(f"prompt, echoed: {name}", body.encode())
    for name, value in MESSAGES.items():
        body = f'{{"max_tokens": 2, "messages": {value}}}'
        yield Poison(f"messages: {name}", body.encode(), CHAT)


def _bodies() -> Iterator[Poison]:
    good = b'{"prompt": [1, 2], "max_tokens": 2}'
    for name, body in BODIES.items():
        yield Poison(f"body: {name}", body)
        yield Poison(f"chat body: {name}", body.replace(b'"prompt"', b'"messages"'), CHAT)
    for name, headers in HEADERS.items():
        yield Poison(f"header: {name}", good, headers=headers)
    bomb = gzip.compress(b" " * 10_000_000)
    yield Poison("header: packed", bomb, headers=JSON | {"content-encoding": "gzip"})
