"""HTTP requests that are wrong in one way or several, the same for the same seed and number."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

CRLF = b"\r\n"


@dataclass(frozen=True)
class Requests:
    """Whole requests of a server, to be spoilt. None of them changes anything, as it is."""

    plain: Sequence[bytes]

    @classmethod
    def of(cls, keys: Sequence[str | None]) -> Requests:
        """Requests with each of the keys; without one where it is None."""
        made = [
            _request(method, path, key, body, content_type)
            for key in keys
            for method, path, body, content_type in _KINDS
        ]
        return cls([*made, *(_chunked(each) for each in made if CRLF * 2 + b"{" in each)])


_JSON = "application/json"
_ROUTER = (60).to_bytes(8, "little") + b'{"__metadata__":{"format":"polyrex.router"}}'.ljust(60)
_KINDS: Sequence[tuple[str, str, bytes, str]] = (
    ("GET", "/livez", b"", ""),
    ("GET", "/v1/models?limit=3", b"", ""),
    ("GET", "/v1/tasks/held", b"", ""),
    ("GET", "/v1/tenants?after=a", b"", ""),
    ("GET", "/openapi.json", b"", ""),
    ("GET", "/metrics", b"", ""),
    ("DELETE", "/v1/tasks/absent", b"", _JSON),
    ("POST", "/v1/completions", b'{"prompt":[1,2,3],"max_tokens":2}', _JSON),
    ("POST", "/v1/completions", b'{"prompt":[7],"max_tokens":3,"stream":true}', _JSON),
    (
        "POST",
        "/v1/chat/completions",
        b'{"messages":[{"role":"user","content":"1 2"}],"max_tokens":2,"task":"held"}',
        _JSON,
    ),
    ("POST", "/v1/tasks", json.dumps({"name": "x", "router": "AAAA"}).encode(), _JSON),
    ("PUT", "/v1/tasks/x", _ROUTER, "application/octet-stream"),
)


def _request(method: str, path: str, key: str | None, body: bytes, content_type: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    if content_type:
        lines += [f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode() + CRLF * 2 + body


def _chunked(request: bytes) -> bytes:
    head, _, body = request.partition(CRLF * 2)
    lines = [line for line in head.split(CRLF) if not line.startswith(b"Content-Length")]
    half = len(body) // 2
    pieces = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:half], body[half:]))
    return CRLF.join([*lines, b"Transfer-Encoding: chunked"]) + CRLF * 2 + pieces + b"0\r\n\r\n"


def case(requests: Requests, seed: int, number: int) -> list[bytes]:
    """The pieces, in which they are sent, of the request of this number."""
    rng = random.Random(f"{seed}-{number}")
    data = rng.choice(requests.plain)
    if rng.random() < 0.2:
        data += b"".join(rng.choices(requests.plain, k=rng.randint(1, 4)))  # one after another
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(_MUTATORS)(rng, data)
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice((0, 0, 0, 1, 3))))
    bounds = [0, *cuts, len(data)]
    return [data[low:high] for low, high in pairwise(bounds)]


def _lines(data: bytes) -> tuple[list[bytes], bytes]:
    head, _, rest = data.partition(CRLF * 2)
    return head.split(CRLF), rest


def _joined(lines: Sequence[bytes], rest: bytes) -> bytes:
    return CRLF.join(lines) + CRLF * 2 + rest


_METHODS = (b"GET", b"PUT", b"HEAD", b"OPTIONS", b"TRACE", b"CONNECT", b"PATCH", b"PRI", b"g\x00t")
_TARGETS = (
    b"*",
    b"//livez",
    b"http://evil.example/livez",
    b"/%00",
    b"/v1/tasks/%2e%2e%2f%2e%2e",
    b"/v1/%74asks",
    b"/v1/tasks/\xff\xfe",
    b"/v1/tasks/" + b"a" * 9000,
    b"/v1/models?after=" + b"%41" * 30000,
    b"/v1/models?limit=-1&limit=x",
    b"livez",
    b"/livez#x",
    b"/livez HTTP/1.1",
    b"",
)
_VERSIONS = (b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2", b"HTTP/9.9", b"http/1.1", b"HTTP/1.1 ", b"")


def _request_line(rng: random.Random, data: bytes) -> bytes:
    lines, rest = _lines(data)
    parts = lines[0].split(b" ")
    at = rng.randrange(3)
    parts[at : at + 1] = [rng.choice((_METHODS, _TARGETS, _VERSIONS)[at])]
    lines[0] = rng.choice((b" ", b" ", b" ", b"  ", b"\t")).join(parts)
    return _joined(lines, rest)


_HOSTS = (
    b"x/docs?",
    b"a/?x=",
    b"evil/#",
    b"x/health?",
    b"user@localhost",
    b"[::1",
    b"",
    b"evil.example",
    b"localhost:99999999",
    b"\xff",
    b"a" * 5000,
)


def _host(rng: random.Random, data: bytes) -> bytes:
    lines, rest = _lines(data)
    kept = [line for line in lines if not line.startswith(b"Host:")]
    count = rng.choice((0, 1, 1, 1, 2))
    return _joined([*kept, *(b"Host: " + rng.choice(_HOSTS) for _ in range(count))], rest)


def _header(rng: random.Random, data: bytes) -> bytes:
    lines, rest = _lines(data)
    odd = (
        b"X-A: " + rng.randbytes(rng.randint(1, 40)),
        b"X-A: " + b"a" * rng.choice((100, 16_000, 17_000, 100_000)),
        b": nameless",
        b"X A: b",
        b"X-A : b",
        b"X-A",
        b" folded",
        b"X-A: \x00",
        b"X-A: b\rX-B: c",
        b"X-A: b\nX-B: c",
        b"X-Polyrex-Min-Revision: " + rng.choice((b"-1", b"x", b"1,2", b"9" * 40)),
        b"If-Match: " + rng.choice((b'"x"', b"*", b'"1", "2"', b"\xe9")),
        b"X-Request-Id: " + rng.choice((b"a" * 5000, b"\xff", b"a b", b"")),
        b"Authorization: Bearer " + rng.randbytes(8),
        b"Cookie: " + b"a=b; " * 500,
        b"Range: bytes=0-1",
        b"Accept: " + rng.randbytes(4),
        b"Content-Encoding: gzip",
        b"Content-Type: " + rng.choice((b"text/plain", b"multipart/form-data", b"\xff", b"")),
    )
    at = rng.randint(1, len(lines))
    count = rng.choice((1, 1, 1, 2, 99, 300))
    return _joined([*lines[:at], *[rng.choice(odd)] * count, *lines[at:]], rest)


_LENGTHS = (
    b"0",
    b"1",
    b"-1",
    b"+5",
    b"0x10",
    b"1, 1",
    b"5 5",
    b"99999999999999999999",
    b"\xb2",
    b"",
)
_ENCODINGS = (b"chunked", b"identity", b"chunked, chunked", b"xchunked", b"gzip, chunked", b"\x0b")


def _framing(rng: random.Random, data: bytes) -> bytes:
    lines, rest = _lines(data)
    if rng.random() < 0.5:
        lines = [line for line in lines if not line.startswith((b"Content-L", b"Transfer-E"))]
    if rng.random() < 0.6:
        lines.append(b"Content-Length: " + rng.choice(_LENGTHS))
    if rng.random() < 0.6:
        lines.append(b"Transfer-Encoding: " + rng.choice(_ENCODINGS))
    return _joined(lines, rest)


_SIZES = (b"-1", b"ffffffffffffffff", b"fffffffffffffffff", b"0x5", b"5 ", b"g", b"", b"5;a=b")


def _chunks(rng: random.Random, data: bytes) -> bytes:
    lines, rest = _lines(data)
    lines = [line for line in lines if not line.startswith((b"Content-L", b"Transfer-E"))]
    size = rng.choice((*_SIZES, b"%x" % max(0, len(rest) + rng.randint(-2, 2))))
    end = rng.choice((b"0\r\n\r\n", b"0\r\nX-Trailer: a\r\n\r\n", b"0\r\n", b"", b"0\r\n" * 3))
    body = size + rng.choice((CRLF, b"\n", b"")) + rest + rng.choice((CRLF, b"\n", b"")) + end
    return _joined([*lines, b"Transfer-Encoding: chunked"], body)


def _truncated(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _bytes(rng: random.Random, data: bytes) -> bytes:
    spoilt = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at, length = rng.randrange(len(spoilt) + 1), rng.choice((0, 1, 1, 4))
        spoilt[at : at + length] = rng.randbytes(rng.choice((0, 1, 1, 3)))
    return bytes(spoilt)


def _ends_of_lines(rng: random.Random, data: bytes) -> bytes:
    return data.replace(CRLF, rng.choice((b"\n", b"\r", b"\r\r\n", b"\n\r")), rng.randint(1, 9))


def _upgrade(rng: random.Random, data: bytes) -> bytes:
    lines, rest = _lines(data)
    asked = rng.choice(
        (
            [b"Expect: 100-continue"],
            [b"Expect: a-miracle"],
            [b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13"],
            [b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c"],
            [b"Connection: close, keep-alive"],
            [b"Connection: Authorization"],
        )
    )
    return _joined([*lines, *asked], rest)


def _garbage(rng: random.Random, _data: bytes) -> bytes:
    return rng.choice(
        (
            rng.randbytes(rng.randint(0, 300)),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200),
            b"\r\n" * rng.randint(1, 50),
            b"GET /livez",
            b"\x00" * 100,
        )
    )


_MUTATORS: Sequence[Callable[[random.Random, bytes], bytes]] = (
    _request_line,
    _host,
    _header,
    _framing,
    _chunks,
    _truncated,
    _bytes,
    _ends_of_lines,
    _upgrade,
    _garbage,
)
