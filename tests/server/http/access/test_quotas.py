"""Tenants' quotas of requests, tokens and completions at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import httpx
import pytest

from polyrex.server.admission.quotas import TenantQuotas
from polyrex.server.errors import InvalidRequest, Overloaded, RateLimited
from polyrex.server.registry.database import Database
from polyrex.server.registry.principal import OPERATOR
from polyrex.server.registry.tenants.directory import Directory
from polyrex.server.registry.tenants.records import Quotas
from support.fake_server import FakeEngine, Serve, Served
from support.tenants.identities import (
    OPERATOR_DIGESTS,
    OPERATOR_KEY,
    bearer,
    client_of,
    make_key,
    make_tenant,
)


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 5.5

    def __call__(self) -> float:
        return self.now


@contextmanager
def opened(folder: Path) -> Iterator[Directory]:
    with closing(Database(f"sqlite:///{folder / 'registry.db'}")) as database:
        yield Directory(database)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    with opened(tmp_path) as found:
        yield found


def test_requests_are_refused_until_the_minute_is_over(directory: Directory) -> None:
    clock = Clock()
    quotas = TenantQuotas(directory, clock)
    directory.create_tenant(OPERATOR, "acme", Quotas(requests_per_minute=2))
    for _ in range(2):
        with quotas.admit("acme", 1):
            clock.now += 10
    with pytest.raises(RateLimited) as refused, quotas.admit("acme", 1):
        pass
    assert refused.value.retry_after == 40
    clock.now += 39.9
    with pytest.raises(RateLimited) as refused, quotas.admit("acme", 1):
        pass
    assert refused.value.retry_after == 1
    clock.now += 0.1
    with quotas.admit("acme", 1):
        assert quotas.headers("acme") == {
            "x-ratelimit-limit-requests": "2",
            "x-ratelimit-remaining-requests": "1",
            "x-ratelimit-reset-requests": "60s",
        }


def test_a_refused_request_is_not_counted(directory: Directory) -> None:
    clock = Clock()
    quotas = TenantQuotas(directory, clock)
    directory.create_tenant(OPERATOR, "acme", Quotas(requests_per_minute=1, concurrent=1))
    with pytest.raises(InvalidRequest), quotas.admit("acme", 2):
        pass
    assert quotas.headers("acme")["x-ratelimit-remaining-requests"] == "1"


def test_tokens_are_counted_at_the_end_and_refused_when_they_are_used_up(
    directory: Directory,
) -> None:
    clock = Clock()
    quotas = TenantQuotas(directory, clock)
    directory.create_tenant(OPERATOR, "acme", Quotas(tokens_per_minute=100))
    with quotas.admit("acme", 1) as meter:
        meter.tokens += 99
        assert quotas.headers("acme")["x-ratelimit-remaining-tokens"] == "100"
    assert quotas.headers("acme")["x-ratelimit-remaining-tokens"] == "1"
    with quotas.admit("acme", 1) as meter:
        meter.tokens += 50
    assert quotas.headers("acme")["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(RateLimited, match="tokens"), quotas.admit("acme", 1):
        pass
    clock.now += 60
    with quotas.admit("acme", 1):
        assert quotas.headers("acme")["x-ratelimit-remaining-tokens"] == "100"


def test_tokens_of_a_request_that_fails_are_counted(directory: Directory) -> None:
    quotas = TenantQuotas(directory, Clock())
    directory.create_tenant(OPERATOR, "acme", Quotas(tokens_per_minute=100))

    def fail() -> None:
        with quotas.admit("acme", 1) as meter:
            meter.tokens += 30
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert quotas.headers("acme")["x-ratelimit-remaining-tokens"] == "70"


def test_completions_at_once_are_bounded_and_the_bound_can_change(directory: Directory) -> None:
    quotas = TenantQuotas(directory, Clock())
    directory.create_tenant(OPERATOR, "acme", Quotas(concurrent=2))
    with ExitStack() as held:
        held.enter_context(quotas.admit("acme", 2))
        with pytest.raises(Overloaded), quotas.admit("acme", 1):
            pass
        directory.change_tenant(OPERATOR, "acme", quotas={"concurrent": 3})
        held.enter_context(quotas.admit("acme", 1))
        with pytest.raises(Overloaded), quotas.admit("acme", 1):
            pass
    with pytest.raises(InvalidRequest), quotas.admit("acme", 4):
        pass
    with quotas.admit("acme", 3):
        assert quotas.headers("acme") == {}


def test_tenants_are_counted_apart_and_one_without_quotas_is_not(directory: Directory) -> None:
    quotas = TenantQuotas(directory, Clock())
    for name in ("acme", "rival"):
        directory.create_tenant(OPERATOR, name, Quotas(requests_per_minute=1))
    with quotas.admit("acme", 1), quotas.admit("rival", 1):
        pass
    for _ in range(100):
        with quotas.admit("default", 8) as meter:
            meter.tokens += 10**6
    assert quotas.headers("default") == {}
    with pytest.raises(RateLimited), quotas.admit("acme", 1):
        pass


@pytest.mark.parametrize("quota", ["requests_per_minute", "tokens_per_minute"])
def test_a_quota_of_nothing_lets_nothing_through(directory: Directory, quota: str) -> None:
    quotas = TenantQuotas(directory, Clock())
    directory.create_tenant(OPERATOR, "acme", Quotas(**{quota: 0}))
    with pytest.raises(RateLimited) as refused, quotas.admit("acme", 1):
        pass
    assert refused.value.retry_after == 60


def test_what_was_counted_goes_on_counting_where_a_quota_changes(directory: Directory) -> None:
    clock = Clock()
    quotas = TenantQuotas(directory, clock)
    directory.create_tenant(OPERATOR, "acme", Quotas(requests_per_minute=2, tokens_per_minute=100))
    with quotas.admit("acme", 1), quotas.admit("acme", 1) as meter:
        meter.tokens += 40
        directory.change_tenant(
            OPERATOR, "acme", quotas={"requests_per_minute": 3, "tokens_per_minute": 50}
        )
    left = quotas.headers("acme")
    assert left["x-ratelimit-remaining-requests"] == "1"
    assert left["x-ratelimit-remaining-tokens"] == "10"
    with quotas.admit("acme", 1) as meter:
        meter.tokens += 10
    for kind in ("requests", "tokens"):
        with pytest.raises(RateLimited, match=kind), quotas.admit("acme", 1):
            pass
        directory.change_tenant(OPERATOR, "acme", quotas={f"{kind}_per_minute": None})
    clock.now += 60
    with quotas.admit("acme", 1):
        assert quotas.headers("acme") == {}


@pytest.fixture
def served(serve: Serve) -> Served:
    return serve(FakeEngine(), api_key_digests=OPERATOR_DIGESTS)


@pytest.fixture
def operator(served: Served) -> Iterator[httpx.Client]:
    with client_of(served.url, OPERATOR_KEY) as client:
        yield client


def as_tenant(served: Served, operator: httpx.Client, **quotas: int) -> None:
    """Let the server's client be a tenant with these quotas."""
    make_tenant(operator, "acme", **quotas)
    served.client.headers.update(bearer(make_key(operator, "acme", "inference")))


def test_answers_say_what_is_left_and_the_refusal_when_to_come_again(
    served: Served, operator: httpx.Client
) -> None:
    as_tenant(served, operator, requests_per_minute=2, tokens_per_minute=10_000)
    first = served.complete(max_tokens=5)
    usage = first.json()["usage"]["total_tokens"]
    second = served.complete(max_tokens=5)
    left = [answer.headers["x-ratelimit-remaining-requests"] for answer in (first, second)]
    assert left == ["1", "0"]
    assert second.headers["x-ratelimit-limit-tokens"] == "10000"
    assert second.headers["x-ratelimit-remaining-tokens"] == str(10_000 - usage)
    assert second.headers["x-ratelimit-reset-requests"].endswith("s")
    refused = served.complete(max_tokens=5)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (429, "rate_limit_exceeded")
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert refused.headers["x-ratelimit-limit-tokens"] == "10000"


def test_streams_are_counted_as_other_requests_are(served: Served, operator: httpx.Client) -> None:
    as_tenant(served, operator, tokens_per_minute=1000)
    usage = served.complete(max_tokens=5).json()["usage"]["total_tokens"]
    assert served.complete(max_tokens=5, stream=True).text.endswith("data: [DONE]\n\n")
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    answer = served.client.post("/v1/chat/completions", json=chat)
    assert answer.headers["x-ratelimit-remaining-tokens"] == str(1000 - 2 * usage)


def test_a_tenant_without_quotas_gets_no_such_headers(
    served: Served, operator: httpx.Client
) -> None:
    as_tenant(served, operator, tasks=3)
    names = served.complete(max_tokens=1).headers.keys()
    assert "content-type" in names
    assert not [name for name in names if name.startswith("x-ratelimit")]
