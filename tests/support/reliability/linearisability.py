"""Whether a history of operations on a register could have happened one after another.

Wing and Gong's search (Testing and Verifying Concurrent Objects, 1993), with the memory of visited
states of Lowe (2017): an order of the operations is sought in which each takes effect at one moment
between its call and its return, and in which each returns what the register then holds. Registers
are independent of each other, so each has a search of its own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

UNKNOWN = math.inf
"""When an operation returned of which nobody knows: it may have happened at any time, or never."""


class Kind(StrEnum):
    """What an operation does."""

    put = "put"  # the register holds its value afterwards
    get = "get"  # returns the value; None where there is none
    drop = "drop"  # the register held something, and holds nothing afterwards


@dataclass(frozen=True)
class Operation:
    """One operation on a register; times are those of one clock, in seconds."""

    key: str
    kind: Kind
    value: str | None
    called: float
    returned: float = UNKNOWN


def too_old(history: Sequence[Operation], seconds: float) -> list[Operation]:
    """The gets that return what a register held no more, more than so many seconds before.

    No search is needed where every put has a value of its own.
    """
    writes = [operation for operation in history if operation.kind is not Kind.get]
    gets = [operation for operation in history if operation.kind is Kind.get]
    return [get for get in gets if not _could_be_read(get, writes, seconds)]


def _could_be_read(get: Operation, writes: Iterable[Operation], seconds: float) -> bool:
    of_key = [write for write in writes if write.key == get.key]
    at_first = Operation(get.key, Kind.drop, None, -math.inf, -math.inf)
    return any(
        write.value == get.value
        and write.called <= get.returned
        and not any(
            later.called > write.returned and later.returned < get.called - seconds
            for later in of_key
        )
        for write in (at_first, *of_key)
    )


def violations(history: Iterable[Operation]) -> list[str]:
    """The registers whose operations no order explains."""
    of_key = defaultdict(list)
    for operation in history:
        of_key[operation.key].append(operation)
    return sorted(key for key, operations in of_key.items() if not _linearisable(operations))


State = str | None


def _linearisable(operations: Iterable[Operation]) -> bool:
    # A get of which nobody knows the answer says nothing.
    known = [o for o in operations if o.kind is not Kind.get or o.returned != UNKNOWN]
    pending = sorted(known, key=lambda operation: operation.called)
    return _search(pending)


def _search(operations: Sequence[Operation]) -> bool:
    """Depth first, over which operations have taken effect and what the register holds then.

    `done` has a bit for each operation; those that returned before others were called are done
    first, so the set of states is small.
    """
    required = sum(1 << n for n, o in enumerate(operations) if o.returned != UNKNOWN)
    seen: set[tuple[int, State]] = {(0, None)}
    stack: list[tuple[int, int, State]] = [(0, 0, None)]
    while stack:
        first, done, state = stack.pop()
        if done & required == required:
            return True
        while done >> first & 1:
            first += 1
        for number in _next(operations, first, done):
            found = _apply(operations[number], state)
            if found is None:
                continue
            reached = (done | 1 << number, found[0])
            if reached not in seen:
                seen.add(reached)
                stack.append((first, *reached))
    return False


def _next(operations: Sequence[Operation], first: int, done: int) -> Iterator[int]:
    """The operations that may take effect now: called before any other that waits returned."""
    waiting = []
    earliest = math.inf
    for number in range(first, len(operations)):
        operation = operations[number]
        if operation.called > earliest:
            break
        if not done >> number & 1:
            waiting.append(number)
            earliest = min(earliest, operation.returned)
    return (number for number in waiting if operations[number].called <= earliest)


def _apply(operation: Operation, state: State) -> tuple[State] | None:
    """What the register holds afterwards; None where the operation could not return its value."""
    if operation.kind is Kind.put:
        return (operation.value,)
    if operation.kind is Kind.drop:
        return (None,) if state is not None or operation.returned == UNKNOWN else None
    return (state,) if operation.value == state else None
