"""Traces through OpenTelemetry's SDK; only tracing.py imports this, where traces are wanted.

The engine runs in a process of its own, which exports nothing: its part of a request is a span that
is made here, from what comes back. Steps are not spans of their own: a span a token would cost more
than the token.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib.metadata import version

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from .requests import Value

_NAME = "polyrex"


def otlp_exporter() -> SpanExporter:
    """Sends traces where the environment says, by OTLP over HTTP."""
    return OTLPSpanExporter()


class OtelTraces:
    """Makes and exports the traces of one application."""

    def __init__(self, exporter: SpanExporter) -> None:
        # The environment's name of the service, if there is one, comes first.
        resource = Resource({SERVICE_NAME: _NAME}).merge(_from_environment())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(_NAME, version(_NAME))
        self._parents = TraceContextTextMapPropagator()

    def begin(self, method: str, headers: Mapping[str, str]) -> OtelRequestTrace:
        """Begin the trace of an HTTP request, or go on with the one that its headers name."""
        parent = self._parents.extract(headers)
        span = self._tracer.start_span(method, parent, SpanKind.SERVER)
        return OtelRequestTrace(self._tracer, span)

    def close(self) -> None:
        """Export what is left, and stop; waits for the collector, but not for ever."""
        self._provider.shutdown()


def _from_environment() -> Resource:
    found = Resource.create()
    named = not str(found.attributes.get(SERVICE_NAME, "")).startswith("unknown_service")
    kept = {name: v for name, v in found.attributes.items() if named or name != SERVICE_NAME}
    return Resource(kept)


class OtelRequestTrace:
    """The spans of one request: HTTP, the wait for a place, the engine."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        self._inside = set_span_in_context(span)
        self._engine: Span | None = None

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        return f"{self._span.get_span_context().trace_id:032x}"

    def queued(self, seconds: float) -> None:
        """A span of the wait that ends now."""
        begun = time.time_ns() - round(seconds * 1e9)
        self._tracer.start_span("queue", self._inside, start_time=begun).end()

    def begin_engine(self, about: Mapping[str, Value]) -> None:
        """A span of the engine's work, in the terms of OpenTelemetry's GenAI conventions."""
        name = f"{about['gen_ai.operation.name']} {about['gen_ai.request.model']}"
        self._engine = self._tracer.start_span(name, self._inside, attributes=about)

    def completion_ended(self, about: Mapping[str, Value]) -> None:
        """An event of the engine's span."""
        if self._engine is not None:
            self._engine.add_event("completion ended", about)

    def end_engine(self, about: Mapping[str, Value], error: str | None) -> None:
        """End the engine's span."""
        if self._engine is not None:
            _end(self._engine, about, error)
            self._engine = None

    def end(self, about: Mapping[str, Value], error: str | None) -> None:
        """End the request's span, which is named after method and route."""
        self._span.update_name(f"{about['http.request.method']} {about['http.route']}")
        _end(self._span, about, error)


def _end(span: Span, about: Mapping[str, Value], error: str | None) -> None:
    span.set_attributes(about)
    if error is not None:
        span.set_attribute("error.type", error)
        span.set_status(Status(StatusCode.ERROR))
    span.end()
