"""The checker of histories accepts what can be ordered, and finds what cannot."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from support.reliability.linearisability import (
    UNKNOWN,
    Kind,
    Operation,
    too_old,
    violations,
)


def put(value: str, called: float, returned: float = UNKNOWN, key: str = "k") -> Operation:
    return Operation(key, Kind.put, value, called, returned)


def get(value: str | None, called: float, returned: float, key: str = "k") -> Operation:
    return Operation(key, Kind.get, value, called, returned)


def drop(called: float, returned: float = UNKNOWN) -> Operation:
    return Operation("k", Kind.drop, None, called, returned)


POSSIBLE = {
    "one after another": [put("a", 0, 1), get("a", 2, 3), put("b", 4, 5), get("b", 6, 7)],
    "nothing at first": [get(None, 0, 1), put("a", 2, 3)],
    "during a put, old then new": [put("a", 0, 1), put("b", 2, 9), get("a", 3, 4), get("b", 5, 6)],
    "a put without an answer happened": [put("a", 0), get("a", 5, 6)],
    "a put without an answer never happened": [put("a", 0), get(None, 5, 6)],
    "it happened late": [put("a", 0), get(None, 5, 6), get("a", 7, 8)],
    "dropped": [put("a", 0, 1), drop(2, 3), get(None, 4, 5)],
    "dropped and put again": [put("a", 0, 1), drop(2, 3), put("b", 4, 5), get("b", 6, 7)],
    "a drop without an answer": [put("a", 0, 1), drop(2), get("a", 3, 4), get(None, 5, 6)],
    "two puts at once": [put("a", 0, 9), put("b", 0, 9), get("b", 10, 11)],
    "two registers": [put("a", 0, 1), get(None, 2, 3, key="other")],
}

IMPOSSIBLE = {
    "stale": [put("a", 0, 1), put("b", 2, 3), get("a", 4, 5)],
    "lost": [put("a", 0, 1), get(None, 2, 3)],
    "invented": [get("a", 0, 1)],
    "from the future": [get("a", 0, 1), put("a", 2, 3)],
    "new then old during a put": [
        put("a", 0, 1),
        put("b", 2, 9),
        get("b", 3, 4),
        get("a", 5, 6),
    ],
    "read after a drop": [put("a", 0, 1), drop(2, 3), get("a", 4, 5)],
    "two drops of one": [put("a", 0, 1), drop(2, 3), drop(4, 5)],
    "a drop of nothing": [drop(0, 1), put("a", 2, 3)],
    "two readers in two orders": [
        put("a", 0, 9),
        put("b", 0, 9),
        get("a", 10, 11),
        get("b", 12, 13),
    ],
}


@pytest.mark.parametrize("history", POSSIBLE.values(), ids=POSSIBLE)
def test_possible_histories_pass(history: list[Operation]) -> None:
    assert violations(history) == []


@pytest.mark.parametrize("history", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_histories_are_found(history: list[Operation]) -> None:
    assert violations(history) == ["k"]


def test_only_the_wrong_register_is_named() -> None:
    history = [put("a", 0, 1, "good"), get("a", 2, 3, "good"), get("x", 0, 1, "bad")]
    assert violations(history) == ["bad"]


def test_a_get_may_be_stale_but_not_for_longer() -> None:
    history = [put("a", 0, 1), put("b", 2, 3), get("a", 3.5, 3.6), get("b", 3.5, 3.6)]
    late = get("a", 4.5, 4.6)
    assert too_old(history, 1.0) == []
    assert too_old([*history, late], 1.0) == [late]


def test_a_get_of_nothing_is_too_old_once_there_is_something() -> None:
    early, late = get(None, 0.5, 0.6), get(None, 2.5, 2.6)
    assert too_old([put("a", 0, 1), early, late], 1.0) == [late]
    assert too_old([put("a", 0, 1), drop(1.5, 1.7), late], 1.0) == []


def test_what_nobody_put_is_too_old() -> None:
    invented = get("x", 2, 3)
    assert too_old([put("a", 0, 1), invented], 10.0) == [invented]


def _explained(history: Sequence[Operation]) -> bool:
    """Try every order of every subset that holds all operations with an answer."""
    certain = [o for o in history if o.returned != UNKNOWN]
    maybe = [o for o in history if o.returned == UNKNOWN]
    subsets = itertools.chain.from_iterable(
        itertools.combinations(maybe, n) for n in range(len(maybe) + 1)
    )
    return any(
        _order_explains(order)
        for subset in subsets
        for order in itertools.permutations([*certain, *subset])
    )


def _order_explains(order: Sequence[Operation]) -> bool:
    state: str | None = None
    for place, operation in enumerate(order):
        if any(later.returned < operation.called for later in order[place + 1 :]):
            return False
        certain = operation.returned != UNKNOWN
        if operation.kind is Kind.get and operation.value != state:
            return False
        if operation.kind is Kind.drop and certain and state is None:
            return False
        if operation.kind is not Kind.get:
            state = operation.value if operation.kind is Kind.put else None
    return True


def _random_history(random_: random.Random) -> list[Operation]:
    history = []
    for _ in range(6):
        called = random_.uniform(0, 5)
        kind = random_.choice(list(Kind))
        values: dict[Kind, list[str | None]] = {
            Kind.put: ["a", "b"],
            Kind.get: ["a", "b", None],
            Kind.drop: [None],
        }
        value = random_.choice(values[kind])
        unknown = kind is not Kind.get and random_.random() < 0.15
        returned = UNKNOWN if unknown else called + random_.uniform(0.1, 2)
        history.append(Operation("k", kind, value, called, returned))
    return history


def test_it_agrees_with_trying_every_order() -> None:
    random_ = random.Random(0)
    found = [0, 0]
    for _ in range(400):
        history = _random_history(random_)
        expected = _explained(history)
        assert (violations(history) == []) is expected, history
        found[expected] += 1
    assert min(found) > 20  # both answers were asked for
