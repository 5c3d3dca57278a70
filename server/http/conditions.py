"""Headers that tie a request to a state of the registry, and those that tell it in an answer.

If-Match and If-None-Match make a change depend on the task's revision, Idempotency-Key makes a
registration safe to repeat, and x-polyrex-min-revision waits until this replica knows a revision.
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Request
from pydantic import WithJsonSchema

from polyrex.server.errors import InvalidRequest, PreconditionFailed
from polyrex.server.registry.records import TaskRecord
from polyrex.server.registry.rows import Existence, Expected

from .context import Context
from .json_body import check_declared_json, media_type

REVISION = "x-polyrex-revision"
MIN_REVISION = "x-polyrex-min-revision"

REPLICA_WAIT = 2.0
"""Seconds that a request waits for the revision that it asks for."""

_ETAG = re.compile(r'"([0-9]{1,18})"')
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
# A list, so that a header that comes twice is seen; what clients are told is that it is one text.
_Header = Annotated[list[str] | None, WithJsonSchema({"type": "string"})]


@dataclass(frozen=True)
class Conditions:
    """What a registration may depend on."""

    expected: Expected
    idempotency_key: str | None


def _one(name: str, values: _Header) -> str | None:
    """A header's value; raises InvalidRequest where it came more than once."""
    if values is not None and len(values) > 1:
        raise InvalidRequest(f"{name} may come once", name)
    return values[0].strip() if values else None


def _if_match(values: _Header) -> Expected:
    tag = _one("If-Match", values)
    if tag is None:
        return None
    if tag == "*":
        return Existence.present
    match = _ETAG.fullmatch(tag)
    if match is None:  # no task ever had such a tag, so the condition cannot hold
        raise PreconditionFailed("If-Match must be one ETag of this task, or *")
    return int(match[1])


async def _of_registration(
    if_match: Annotated[
        _Header, Header(description="an ETag of the task, or *: only if it is still that, or there")
    ] = None,
    if_none_match: Annotated[
        _Header, Header(description="*: only if there is no task of this name")
    ] = None,
    idempotency_key: Annotated[
        _Header, Header(description="up to 255 characters; the request may be repeated with it")
    ] = None,
) -> Conditions:
    expected = _if_match(if_match)
    none = _one("If-None-Match", if_none_match)
    if none is not None:
        if none != "*" or expected is not None:
            raise InvalidRequest("If-None-Match must be *, without If-Match", "If-None-Match")
        expected = Existence.absent
    key = _one("Idempotency-Key", idempotency_key)
    if key is not None and not _KEY.fullmatch(key):
        raise InvalidRequest("must be 1 to 255 printable ASCII characters", "Idempotency-Key")
    return Conditions(expected, key)


async def _of_edit(
    if_match: Annotated[
        _Header, Header(description="an ETag of the task: only if it is still that")
    ] = None,
    if_none_match: Annotated[_Header, Header(include_in_schema=False)] = None,
    idempotency_key: Annotated[_Header, Header(include_in_schema=False)] = None,
) -> Expected:
    # A client that sends these relies on them, so they are not ignored.
    if if_none_match is not None or idempotency_key is not None:
        raise InvalidRequest(
            "If-None-Match and Idempotency-Key are for registrations; here, send If-Match"
        )
    return _if_match(if_match)


RegisterConditions = Annotated[Conditions, Depends(_of_registration)]
EditCondition = Annotated[Expected, Depends(_of_edit)]


async def _none(request: Request) -> None:
    for name in ("If-Match", "If-None-Match", "Idempotency-Key"):
        if name in request.headers:
            raise InvalidRequest(f"{name} is for the routes of tasks; this one knows none", name)


UNCONDITIONAL = Depends(_none)
"""Refuses the headers of a condition where none is heeded: a client that sends one relies on it."""


async def _reached(
    context: Context,
    x_polyrex_min_revision: Annotated[
        _Header, Header(description="answer from this revision of the registry, or a later one")
    ] = None,
) -> None:
    wanted = _one(MIN_REVISION, x_polyrex_min_revision)
    if wanted is None:
        return
    if not re.fullmatch(r"[0-9]{1,18}", wanted):
        raise InvalidRequest(f"must be a number from {REVISION}", MIN_REVISION)
    # Sleeping here costs no thread, whatever number many clients may ask for.
    deadline = time.monotonic() + REPLICA_WAIT
    while context.registry.revision < int(wanted) and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    context.registry.wait_for(int(wanted), timeout=0)


MIN_REVISION_REACHED = Depends(_reached)
"""Waits for the revision of x-polyrex-min-revision; a 503 where this replica does not get there."""


async def _declared_json(request: Request) -> None:
    bare = not media_type(request) and request.method in ("PUT", "DELETE")
    if request.method != "GET" and not bare:
        check_declared_json(request)


JSON_ONLY = Depends(_declared_json)
"""Refuses a change whose body is not declared as JSON, also where there is none to a POST.

A browser asks before a web page may send JSON, PUT or DELETE to another site.
"""


def revision_headers(context: Context, task: TaskRecord | None = None) -> dict[str, str]:
    """The headers of an answer that shows the registry, or one task of it."""
    known = context.registry.revision
    if task is None:
        return {REVISION: str(known)}
    return {REVISION: str(max(known, task.changed)), "ETag": f'"{task.changed}"'}
