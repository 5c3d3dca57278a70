"""Reads JSON bodies: their bytes bound what that costs, and large ones leave the event loop.

`parse` makes plain values out of bytes, and stops where a body has more in it than any that this
server takes. The classes of requests/bodies.py then check these values, up to the first bad item of
a list. Both are done in a thread where the body is large; a `JsonRoute` hands FastAPI the result.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.responses import Response

from polyrex.server.errors import InvalidRequest, Overloaded, UnsupportedBody

from .error_handlers import invalid_fields

MAX_STRUCTURE = 1 << 15
"""Lists, objects and keys in one body; a chat needs three for each message, and for each part."""
MAX_KEYS = 256
"""Keys of one object."""

_LARGE = 16 << 10
"""Bytes from which on a body is read in a thread: smaller ones take less than a millisecond."""
MOST_LARGE = 64
"""Large bodies that are read or wait for it at the same time."""

T = TypeVar("T")


class BodyReader:
    """Reads and checks JSON bodies; starts no thread before the first large one.

    There is one thread. A parser keeps the interpreter to itself while it runs, so a second one
    would read nothing sooner, and would take turns from the event loop.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "large-bodies")
        self._under_way = 0

    async def read(self, kind: TypeAdapter[T], body: bytes) -> T:
        """The body as a value of a kind.

        Raises InvalidRequest where it is not one; Overloaded where too many large bodies wait.
        """
        if len(body) < _LARGE:
            return read(kind, body)
        if self._under_way == MOST_LARGE:
            raise Overloaded("too many large bodies at once")
        self._under_way += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, read, kind, body)
        finally:
            self._under_way -= 1

    def close(self) -> None:
        """Wait for the body that is being read; those that wait for it are not read any more."""
        self._thread.shutdown(cancel_futures=True)


def read(kind: TypeAdapter[T], body: bytes) -> T:
    """The body as a value of a kind; raises InvalidRequest."""
    value = parse(body)
    try:
        return kind.validate_python(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        raise invalid_fields([each | {"loc": ("body", *each["loc"])} for each in found]) from error


def parse(body: bytes) -> Any:
    """The value of a JSON document in UTF-8.

    Raises InvalidRequest where it is none, has NaN, infinity or a key twice, or too much in it.
    """
    if len(body) > MAX_STRUCTURE and _structure(body) > MAX_STRUCTURE:
        raise InvalidRequest(f"the body has more than {MAX_STRUCTURE} lists, objects and keys")
    try:
        return _DECODER.decode(body.decode())
    except UnicodeDecodeError as error:
        raise InvalidRequest("the body is not JSON: it is not UTF-8") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise InvalidRequest(f"the body is not JSON: {error.msg} ({place})") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error
    except ValueError as error:  # Python refuses to read thousands of digits
        raise InvalidRequest("the body has a number of too many digits") from error


def _structure(body: bytes) -> int:
    """How many lists, objects and keys a document has; where they are few, an upper bound.

    Each is an allocation that Python's garbage collector may follow, again and again: hundreds of
    thousands take half a second, in which nothing else runs.
    """
    found = sum(body.count(mark) for mark in b"[{:")
    if found <= MAX_STRUCTURE:
        return found
    # Texts may have such marks too. Without escapes, a quote begins a text or ends one.
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside = b"".join(plain.split(b'"')[::2])
    return sum(outside.count(mark) for mark in b"[{:")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise InvalidRequest(f"an object of the body has more than {MAX_KEYS} keys")
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise InvalidRequest(f"the key {twice!r:.80} comes twice", twice[:80])
    return value


def _no_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"the body is not JSON: {name} is no JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)


def media_type(request: Request) -> str:
    """The body's media type in lower case, without parameters; empty where there is none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def check_declared_json(request: Request) -> None:
    """Raise UnsupportedBody unless the body is declared as JSON.

    A browser asks before a web page may send JSON to another site.
    """
    found = media_type(request)
    if found != "application/json":
        raise UnsupportedBody(f"content-type must be application/json, got {found!r:.80}")


class _ReadRequest(Request):
    """A request whose body has been read and checked."""

    def __init__(self, request: Request, body: bytes, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._read = body, value

    async def body(self) -> bytes:
        return self._read[0]

    async def json(self) -> Any:
        return self._read[1]


class JsonRoute(APIRoute):
    """A route whose parameter `body`, where it has one, is read and checked by a BodyReader.

    FastAPI finds it made already, and describes it in /openapi.json as ever.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()
        if self.body_field is None:
            return answer
        annotation = self.body_field.field_info.annotation
        assert annotation is not None
        kind: TypeAdapter[Any] = TypeAdapter(annotation)

        async def answer_read(request: Request) -> Response:
            body = await request.body()
            if not body:  # FastAPI knows whether it may be absent
                return await answer(request)
            check_declared_json(request)
            reader: BodyReader = request.app.state.context.bodies
            return await answer(_ReadRequest(request, body, await reader.read(kind, body)))

        return answer_read
