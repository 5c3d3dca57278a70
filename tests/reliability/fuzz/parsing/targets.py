"""What reads bytes that come from anybody, each as a function that a fuzzer calls."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import TypeAdapter
from starlette.datastructures import Headers

from polyrex.adapters.errors import PolyrexError
from polyrex.adapters.files.inventory import read_inventory
from polyrex.adapters.files.router import read_router
from polyrex.adapters.model.base_model import load_tokenizer
from polyrex.server.http.hosts import check_host, check_origin
from polyrex.server.http.json_body import read
from polyrex.server.registry.names import (
    Reference,
    check_labels,
    check_task_name,
    check_tenant_name,
)
from polyrex.server.registry.registration import check_text
from polyrex.server.requests import bodies
from polyrex.server.requests.text import Tokenizer
from support.reliability.small_base import Routers

Target = Callable[[bytes], None]


def _router(folder: Path) -> Target:
    inventory = read_inventory(folder / "inventory.safetensors")

    def target(data: bytes) -> None:
        router = read_router(data, "upload", inventory)
        check_text(router, "upload")
        json.dumps([dict(router.metadata.provenance), dict(router.metadata.scores)]).encode()

    return target


_BODIES: Sequence[TypeAdapter[object]] = [
    TypeAdapter(kind)
    for kind in (
        bodies.CompletionRequest,
        bodies.ChatCompletionRequest,
        bodies.FitRequest,
        bodies.NewTask,
        bodies.CanaryBody,
        bodies.RollBack,
        bodies.LoadLora,
    )
]


def _body(_folder: Path) -> Target:
    def target(data: bytes) -> None:
        kind = _BODIES[data[0] % len(_BODIES)] if data else _BODIES[0]
        made = read(kind, data[1:])
        if isinstance(made, bodies.CompletionRequest):
            assert made.completions >= 1

    return target


def _name(_folder: Path) -> Target:
    accepted = frozenset({"localhost", "[::1]"})

    def target(data: bytes) -> None:
        text = data.decode(errors="surrogateescape")
        headers = Headers(raw=[(b"host", data), (b"origin", data)])
        checks: Sequence[Callable[[], object]] = (
            lambda: Reference.parse(text),
            lambda: check_task_name(text),
            lambda: check_tenant_name(text, "name"),
            lambda: check_labels({text: text}),
            lambda: check_host(headers, accepted),
            lambda: check_origin("POST", headers),
        )
        for check in checks:
            _declared(check)

    return target


def _chat(folder: Path) -> Target:
    tokenizer = Tokenizer(load_tokenizer(str(folder / "base")))
    kind = TypeAdapter(bodies.ChatCompletionRequest)
    roles = ("user", "assistant", "system")

    def target(data: bytes) -> None:
        turns = [
            {"role": roles[part[0] % 3], "content": part[1:].decode(errors="replace")}
            for part in data.split(b"\x1e")
            if part
        ]
        chat = read(kind, json.dumps({"messages": turns}).encode())
        said = [{"role": turn.role, "content": turn.text} for turn in chat.messages]
        text = tokenizer.render_chat(said)
        ids = tokenizer.encode(text, special=False)
        assert not tokenizer.exceeds(text, len(ids))  # what would fit is not refused
        tokenizer.decode(ids)

    return target


def _declared(call: Callable[[], object]) -> None:
    """Call it; what the server declares as its errors is as good as an answer."""
    try:
        call()
    except PolyrexError:
        return


TARGETS: dict[str, Callable[[Path], Target]] = {
    "router": _router,
    "body": _body,
    "name": _name,
    "chat": _chat,
}


def guarded(target: Target) -> Target:
    """The target, from which only errors come that the server does not declare."""
    return lambda data: _declared(lambda: target(data))


def seeds(name: str, folder: Path) -> list[bytes]:
    """Inputs to begin with."""
    if name == "router":
        router = Routers(read_inventory(folder / "inventory.safetensors"))(0)
        length = struct.unpack("<Q", router[:8])[0]
        lies = [struct.pack("<Q", lie) + router[8:] for lie in (0, length - 8, 1 << 40)]
        return [router, router[:-4], router + b"\0", *lies]
    if name == "body":
        return [bytes([kind]) + json.dumps(body).encode() for kind, body in enumerate(_VALID)]
    if name == "name":
        return [b"plural", b"team:plural@3", b"plural@prod", b"localhost:8000", b"http://[::1]:80"]
    odd = "\0é\u202e\U0001f600".encode()
    return [b"\0one two\x1e\1three", b"\2be short\x1e\0{{ 7*7 }}{% raw %}", odd]


_VALID: Sequence[object] = (
    {
        "prompt": ["a", "b"],
        "max_tokens": 3,
        "stop": ["x"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": 2,
        "seed": -1,
        "temperature": 0.5,
    },
    {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "é"}]}],
        "top_logprobs": 2,
        "logprobs": True,
        "logit_bias": {},
    },
    {
        "instruction": "i",
        "rows": [{"input": "a", "answer": "b", "options": ["b", "c"]}] * 8,
        "replace": True,
    },
    {"name": "x", "router": "AAAA", "labels": {"a": "b"}},
    {"version": 2, "share": 0.5},
    {"version": None},
    {"lora_name": "x", "lora_path": "/x", "load_inplace": False},
)
"""A valid body of each of _BODIES."""
