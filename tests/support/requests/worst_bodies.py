"""Bodies of a megabyte, the limit, that cost a server the most: all of them are to be refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from polyrex.server.requests.bodies import ChatCompletionRequest, CompletionRequest, FitRequest

MEGABYTE = 1 << 20
Body = tuple[TypeAdapter[Any], bytes]
"""What the route takes, and the bytes."""

CHAT: TypeAdapter[Any] = TypeAdapter(ChatCompletionRequest)
COMPLETION: TypeAdapter[Any] = TypeAdapter(CompletionRequest)
FIT: TypeAdapter[Any] = TypeAdapter(FitRequest)


def filled(before: str, item: str, after: str) -> bytes:
    """As many items, between two texts, as a megabyte has room for."""
    count = (MEGABYTE - len(before) - len(after) + 1) // (len(item) + 1)
    return (before + ",".join([item] * count) + after).encode()


def content(item: str) -> Body:
    return CHAT, filled('{"messages":[{"role":"user","content":[', item, "]}]}")


def prompt(item: str, after: str = "") -> Body:
    return COMPLETION, filled('{"prompt":[', item, f"{after}]}}")


def _keys(count: int) -> bytes:
    return json.dumps(
        {"prompt": "x", **{f"k{number:06d}": 1 for number in range(count)}}, separators=(",", ":")
    ).encode()


WORST: Mapping[str, Body] = {
    "chat content of {}": content("{}"),
    "chat content of 1": content("1"),
    "chat content of text parts": content('{"type":"text","text":"a"}'),
    "chat messages of {}": (CHAT, filled('{"messages":[', "{}", "]}")),
    "prompt of -1": prompt("-1"),
    'prompt of "a"': prompt('"a"'),
    "prompt of [1]": prompt("[1]"),
    "prompt of []": prompt("[]"),
    "prompt of 1, the last one -1": prompt("1", ",-1"),
    "prompt of numbers with 4,000 digits": prompt("7" * 4000),
    "prompt of 0.5": prompt("0.5"),
    "prompt of escaped surrogates": (
        COMPLETION,
        b'{"prompt":"' + b"\\ud83d" * ((MEGABYTE - 13) // 6) + b'"}',
    ),
    "stop of texts": (COMPLETION, filled('{"prompt":"x","stop":[', '"a"', "]}")),
    "logit_bias of {}": (COMPLETION, filled('{"prompt":"x","logit_bias":[', "{}", "]}")),
    "unknown keys": (COMPLETION, _keys(80_000)),
    "one unknown key": (COMPLETION, b'{"' + b"k" * (MEGABYTE - 20) + b'":1,"prompt":"x"}'),
    "an unknown value": (COMPLETION, filled('{"prompt":"x","k":[', "1", "]}")),
    "nested lists": (COMPLETION, b"[" * MEGABYTE),
    "nested objects": (COMPLETION, b'{"a":' * (MEGABYTE // 5)),
    "one number": (COMPLETION, b'{"prompt":' + b"1" * (MEGABYTE - 11) + b"}"),
    "one fraction": (COMPLETION, b'{"temperature":0.' + b"1" * (MEGABYTE - 18) + b"}"),
    "rows of {}": (FIT, filled('{"instruction":"x","rows":[', "{}", "]}")),
    "a row of {}": (FIT, filled('{"instruction":"x","rows":[[', "{}", "]]}")),
    "options of 1": (
        FIT,
        filled(
            '{"instruction":"x","rows":[' + '{"input":"i","answer":"a","options":[', "1", "]}]}"
        ),
    ),
}
