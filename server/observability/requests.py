"""What is known of the HTTP request under way: its log lines, metrics and trace say it.

It is kept in a context variable, which tasks and threads that work for the request inherit, so
that nothing on the way has to hand it on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # it imports torch, which takes seconds: logs begin before
    from polyrex.adapters.files.task import TaskInfo

Value = str | int | float


class RequestTrace(Protocol):
    """The trace of one request: tracing.py makes it where traces are exported."""

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        ...

    def queued(self, seconds: float) -> None:
        """The request has a place in the engine now, after waiting for it."""
        ...

    def begin_engine(self, about: Mapping[str, Value]) -> None:
        """The engine has the request from now on."""
        ...

    def completion_ended(self, about: Mapping[str, Value]) -> None:
        """One of the request's completions has ended."""
        ...

    def end_engine(self, about: Mapping[str, Value], error: str | None) -> None:
        """The engine is done with the request; `error` is the name of what went wrong."""
        ...

    def end(self, about: Mapping[str, Value], error: str | None) -> None:
        """The request is over."""
        ...


@dataclass
class RequestRecord:
    """What is known of one request; times are seconds of time.perf_counter."""

    id: str = ""
    state: Mapping[str, Any] = field(default_factory=dict)  # of the ASGI scope
    begun: float = field(default_factory=time.perf_counter)
    received: float = field(default_factory=time.perf_counter)  # the whole of it
    task: TaskInfo | None = None  # the version that answers
    prompt_tokens: int = 0
    generated_tokens: int = 0
    error: str | None = None  # the code of the error that was answered
    trace: RequestTrace | None = None

    @property
    def tenant(self) -> str | None:
        """The tenant of the API key, once the key has been checked."""
        principal = self.state.get("principal")
        return None if principal is None else str(principal.tenant)

    def fields(self) -> dict[str, Value]:
        """What a log line says of the request, as far as it is known."""
        known: dict[str, Value] = {}
        if self.id:
            known["request_id"] = self.id
        if self.trace is not None:
            known["trace_id"] = self.trace.trace_id
        if self.tenant is not None:
            known["tenant"] = self.tenant
        if self.task is not None:
            known |= {"task": self.task.name, "version": self.task.version}
        return known


_current: ContextVar[RequestRecord] = ContextVar("request")


def current_request() -> RequestRecord:
    """The record of the request that runs here; outside any request, a blank one."""
    return _current.get(None) or RequestRecord()


def begin_request(record: RequestRecord) -> Token[RequestRecord]:
    """Let log lines and metrics speak of this request; `end_request` takes the token."""
    return _current.set(record)


def end_request(token: Token[RequestRecord]) -> None:
    """Go back to what was before."""
    _current.reset(token)
