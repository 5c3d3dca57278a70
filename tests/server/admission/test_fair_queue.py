"""Who is next: shares by weight, no starvation, no credit for the past, nothing left behind."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyrex.server.admission.fair_queue import Account, FairQueue, Waiting
from support.admission.slow_queue import ForgetfulQueue, SlowQueue, SlowRequest

# Powers of two, and whole tokens: then both queues compute exactly, and ties are ties.
WEIGHTS = {"a": 1.0, "b": 1.0, "c": 2.0, "d": 4.0}
TENANTS = st.sampled_from(sorted(WEIGHTS))
PUSH = st.tuples(st.just("push"), TENANTS, st.integers(1, 4), st.integers(1, 50))
TAKE = st.tuples(st.just("take"), st.just(0), st.just(0), st.just(0))
END = st.tuples(st.just("end"), st.integers(0, 99), st.just(0), st.integers(0, 200))
STEPS = st.lists(PUSH | TAKE | TAKE | END, max_size=80)
Step = tuple[str, object, int, int]


class Pair:
    """The queue and its slow twin, side by side."""

    def __init__(self, slow: SlowQueue) -> None:
        self.fast: FairQueue[int] = FairQueue()
        self.slow = slow
        self.accounts = {name: Account[int](weight) for name, weight in WEIGHTS.items()}
        self.alive: list[tuple[Waiting[int], SlowRequest]] = []
        self.pushed = 0

    def step(self, step: Step) -> tuple[int | None, int | None]:
        """Do the same to both; returns what each says is next."""
        what, which, parts, tokens = step
        if what == "push":
            tenant = str(which)
            slow = SlowRequest(tenant, self.pushed, parts, tokens)
            fast = self.fast.push(self.accounts[tenant], self.pushed, parts, tokens)
            self.slow.push(slow)
            self.alive.append((fast, slow))
            self.pushed += 1
        elif what == "take":
            first, first_slow = self.fast.first(), self.slow.first()
            if first is not None and first_slow is not None:
                self.fast.take(first)
                self.slow.take(first_slow)
        elif self.alive:
            assert isinstance(which, int)
            fast, slow = self.alive.pop(which % len(self.alive))
            self.fast.remove(fast)
            self.slow.remove(slow)
            self.fast.settle(fast, tokens)
            self.slow.settle(slow, tokens)
        first, first_slow = self.fast.first(), self.slow.first()
        return (
            None if first is None else first.item,
            None if first_slow is None else first_slow.number,
        )


@given(STEPS)
def test_it_serves_in_the_order_of_its_slow_twin(steps: list[Step]) -> None:
    pair = Pair(SlowQueue(WEIGHTS))
    for step in steps:
        fast, slow = pair.step(step)
        assert fast == slow
        assert pair.fast.parts == sum(request.parts for request in pair.slow.requests)
        assert pair.fast.tokens == sum(one.parts * one.cost for one in pair.slow.requests)


def test_a_twin_that_gives_credit_for_the_past_serves_otherwise() -> None:
    served: list[Step] = [("push", "a", 1, 40), ("take", 0, 0, 0), ("end", 0, 0, 40)]
    steps: list[Step] = [*served * 10, ("push", "b", 8, 10), ("push", "a", 8, 10)]
    steps += [("take", 0, 0, 0)] * 8
    right, wrong = Pair(SlowQueue(WEIGHTS)), Pair(ForgetfulQueue(WEIGHTS))
    assert all(fast == slow for fast, slow in map(right.step, steps))
    assert not all(fast == slow for fast, slow in map(wrong.step, steps))


def keep_waiting(
    queue: FairQueue[str], accounts: dict[str, Account[str]], chance: random.Random, most: int
) -> None:
    """Let every tenant have two requests in the queue at least."""
    for name, account in accounts.items():
        while len(account.waiting) < 2:
            queue.push(account, name, chance.randint(1, 3), chance.randint(1, most))


@pytest.mark.parametrize("seed", range(5))
def test_tenants_that_always_wait_get_tokens_by_their_weights(seed: int) -> None:
    chance, most = random.Random(seed), 100
    queue: FairQueue[str] = FairQueue()
    accounts = {name: Account[str](weight) for name, weight in WEIGHTS.items()}
    served: Counter[str] = Counter()
    for _ in range(2000):
        keep_waiting(queue, accounts, chance, most)
        first = queue.first()
        assert first is not None
        queue.take(first)
        served[first.item] += int(first.cost)
        for one in WEIGHTS:
            for other in WEIGHTS:
                apart = served[one] / WEIGHTS[one] - served[other] / WEIGHTS[other]
                assert apart <= most / WEIGHTS[one]  # within the cost of one completion


@pytest.mark.parametrize("guess", [0.1, 1, 10])
def test_wrong_estimates_are_put_right_by_what_was_used(guess: float) -> None:
    queue: FairQueue[str] = FairQueue()
    accounts = {"honest": Account[str](), "other": Account[str]()}
    guesses = {"honest": 1.0, "other": guess}
    running: list[Waiting[str]] = []
    served: Counter[str] = Counter()
    for _ in range(4000):
        for name, account in accounts.items():
            while len(account.waiting) < 2:
                queue.push(account, name, 1, 20 * guesses[name])
        first = queue.first()
        assert first is not None
        queue.take(first)
        running.append(first)
        if len(running) > 16:
            over = running.pop(0)
            served[over.item] += 20
            queue.settle(over, 20)
    assert served["honest"] / served["other"] == pytest.approx(1, rel=0.05)


def test_estimates_that_were_too_high_become_no_claim_on_those_that_come_later() -> None:
    queue: FairQueue[str] = FairQueue()
    wrong, other, newcomer = Account[str](), Account[str](), Account[str]()
    thought = [queue.push(wrong, "wrong", 1, 1000) for _ in range(20)]
    for request in thought:
        queue.take(request)
    for _ in range(100):
        request = queue.push(other, "other", 1, 100)
        queue.take(request)
        queue.settle(request, 100)
    queue.push(wrong, "wrong", 1000, 100)
    for request in thought:
        queue.settle(request, 1)
    queue.push(newcomer, "newcomer", 1, 100)
    taken = 0
    while (first := queue.first()) is not None and first.item != "newcomer":
        queue.take(first)
        taken += 1
    assert taken <= 1000 / 100


def test_a_tenant_that_was_away_is_next_but_gets_no_more_than_its_share() -> None:
    queue: FairQueue[str] = FairQueue()
    busy, back = Account[str](), Account[str]()
    for _ in range(1000):
        first = queue.push(busy, "busy", 1, 10)
        queue.take(first)
        queue.settle(first, 10)
    for _ in range(10):
        queue.push(busy, "busy", 1, 10)
        queue.push(back, "back", 1, 10)
    order = []
    for _ in range(20):
        first_of_all = queue.first()
        assert first_of_all is not None
        order.append(first_of_all.item)
        queue.take(first_of_all)
    assert order[0] in ("busy", "back")
    assert [order[i : i + 2].count("back") for i in range(0, 20, 2)] == [1] * 10


def test_a_flood_delays_a_newcomer_by_no_more_than_one_completion() -> None:
    queue: FairQueue[str] = FairQueue()
    flood, other = Account[str](), Account[str]()
    for _ in range(500):
        queue.push(flood, "flood", 8, 100)
    for _ in range(50):
        first = queue.first()
        assert first is not None
        queue.take(first)
    newcomer = queue.push(other, "other", 1, 100)
    assert queue.first() is newcomer


def test_a_tenant_is_served_in_the_order_of_its_requests() -> None:
    queue: FairQueue[int] = FairQueue()
    accounts = [Account[int](), Account[int]()]
    chance = random.Random(7)
    for number in range(200):
        queue.push(accounts[number % 2], number, chance.randint(1, 3), chance.randint(1, 9))
    taken: list[int] = []
    while (first := queue.first()) is not None:
        queue.take(first)
        taken.append(first.item)
    for tenant in (0, 1):
        own = [number for number in taken if number % 2 == tenant]
        assert own == sorted(own)


def test_nothing_is_left_of_requests_that_are_cancelled() -> None:
    queue: FairQueue[int] = FairQueue()
    account = Account[int]()
    waiting = [queue.push(account, number, 3, 0.1) for number in range(1000)]
    queue.take(waiting[0])
    random.Random(3).shuffle(waiting)
    for one in waiting:
        queue.remove(one)
        queue.settle(one, 0)
    assert (queue.parts, queue.tokens, queue.first()) == (0, 0, None)
    assert (account.parts, account.tokens, len(account.waiting)) == (0, 0, 0)


def test_memory_is_bounded_by_what_waits() -> None:
    queue: FairQueue[int] = FairQueue()
    accounts = [Account[int]() for _ in range(3)]
    for account in accounts:
        queue.push(account, 0, 10**9, 10_000)
    for _ in range(5000):
        first = queue.first()
        assert first is not None
        queue.take(first)
        queue.settle(first, 1)  # far less than the estimate
    assert len(queue._heap) < 200
    for _ in range(5000):  # a client that comes and leaves
        came = queue.push(accounts[0], 0, 1, 10)
        queue.remove(came)
        queue.settle(came, 0)
        assert len(queue._heap) < 100
