"""Traces of requests, where OpenTelemetry's own variables say that there is a collector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from polyrex.server.errors import StartError

from .requests import RequestTrace

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"


class Traces(Protocol):
    """Makes the traces of requests, and exports them."""

    def begin(self, method: str, headers: Mapping[str, str]) -> RequestTrace:
        """Begin the trace of an HTTP request; `headers` are those that name its parent."""
        ...

    def close(self) -> None:
        """Export what is left, and stop."""
        ...


def traces_from(environment: Mapping[str, str]) -> Traces | None:
    """The exporter that the environment asks for; None where it names no collector.

    Raises StartError where it asks for what is not there. OpenTelemetry's packages are imported
    only if they are needed.
    """
    named = [name for name in _ENDPOINTS if environment.get(name)]
    if not named or environment.get("OTEL_TRACES_EXPORTER", "otlp") == "none":
        return None
    for name in _PROTOCOLS:
        if environment.get(name, _PROTOCOL) != _PROTOCOL:
            raise StartError(f"{name}: traces are exported by {_PROTOCOL} alone")
    try:
        from .otel import OtelTraces, otlp_exporter
    except ImportError as error:
        raise StartError(
            f"{named[0]} is set, and traces need pip install 'polyrex[otel]': {error}"
        ) from error
    return OtelTraces(otlp_exporter())
