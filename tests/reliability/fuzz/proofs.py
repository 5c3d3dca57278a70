"""The proofs of fuzzing, at any length, with defects or without."""

from __future__ import annotations

from reliability.fuzz.parsing.run import parsers
from reliability.fuzz.rawsockets.run import sockets
from reliability.fuzz.schemas.run import schema
from reliability.fuzz.served import kept, serving
from reliability.ground import Ground
from reliability.result import Result


def fuzzed_document(ground: Ground, *defects: str, cases: int, examples: int) -> Result:
    """Schemathesis on a server of its own."""
    with serving(ground.small, ground.folder(), *defects) as served:
        return schema(served, ground.small, ground.folder(), cases=cases, examples=examples)


def fuzzed_sockets(ground: Ground, *defects: str, count: int) -> Result:
    """Mutated requests to a server of its own; those that go wrong are kept in the cache."""
    found = ground.folder() if defects else kept("sockets")
    with serving(ground.small, ground.folder(), *defects) as served:
        return sockets(served, found, count=count)


def fuzzed_parsers(ground: Ground, *, executions: int, planted: bool = False) -> Result:
    """Coverage-guided inputs; the cache keeps the corpus, and how far a run has come."""
    work = ground.folder() if planted else kept("parsers")
    return parsers(ground.small, work, executions=executions, planted=planted)
