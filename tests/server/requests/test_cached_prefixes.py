"""From a request to the engine's cache salt, and from the engine's counts to `usage`."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.files.inventory import Inventory
from polyrex.server.engines.base import EngineStats, GenerationRequest, TokenChunk
from support.fake_server import FakeEngine, Serve, Served, serving
from support.random_inventory import MakeRouter
from support.tenants.identities import (
    OPERATOR_DIGESTS,
    OPERATOR_KEY,
    client_of,
    make_key,
    make_tenant,
)


def add(client: httpx.Client, name: str, router: bytes) -> None:
    headers = {"content-type": "application/octet-stream"}
    answer = client.put(f"/v1/tasks/{name}", content=router, headers=headers)
    assert answer.is_success, answer.text


def salts(served: Served, client: httpx.Client | None = None, **body: object) -> list[str]:
    """The salts that the engine gets with a request, one for each choice."""
    before = len(served.engine.requests)
    json = {"prompt": "Hello", "max_tokens": 1, **body}
    answer = (client or served.client).post("/v1/completions", json=json)
    assert answer.status_code == 200, answer.text
    return [request.cache_salt for request in served.engine.requests[before:]]


def test_requests_to_one_router_share_a_salt_and_others_do_not(
    served: Served, make_router: MakeRouter
) -> None:
    for name, seed in (("one", 1), ("two", 2), ("same-as-one", 1)):
        add(served.client, name, make_router(seed))
    (base,), (one,), (two,) = salts(served), salts(served, task="one"), salts(served, task="two")
    assert len({base, one, two}) == 3
    assert all(len(salt) == 64 for salt in (base, one, two))
    assert salts(served, task="one", n=2, prompt=["a", "b"]) == [one] * 4
    assert salts(served, task="same-as-one") == [one]
    add(served.client, "one", make_router(2))
    assert salts(served, task="one") == [two]
    assert salts(served, task="one@1") == [one]


def test_a_clients_own_salt_parts_its_requests_and_never_reaches_the_engine(
    served: Served,
) -> None:
    (plain,), (mine,) = salts(served), salts(served, cache_salt="mine")
    assert plain != mine
    assert salts(served, cache_salt="mine") == [mine]
    assert salts(served, cache_salt=plain) not in ([plain], [mine])
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "cache_salt": "mine"}
    assert served.client.post("/v1/chat/completions", json=chat).status_code == 200
    assert served.engine.requests[-1].cache_salt == mine


@pytest.mark.parametrize("salt", ["", "x" * 257, 7, "\ud800"])
def test_a_salt_is_text_of_256_characters_at_most(served: Served, salt: object) -> None:
    body = json.dumps({"prompt": "Hello", "cache_salt": salt})
    headers = {"content-type": "application/json"}
    answer = served.client.post("/v1/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "cache_salt"


def test_tenants_have_salts_of_their_own_for_the_same_router(
    serve: Serve, make_router: MakeRouter
) -> None:
    served = serve(api_key_digests=OPERATOR_DIGESTS)
    with client_of(served.url, OPERATOR_KEY) as operator:
        for tenant in ("acme", "other"):
            make_tenant(operator, tenant)
        keys = [make_key(operator, tenant, "task-admin") for tenant in ("acme", "acme", "other")]
        found = []
        for key in keys:
            with client_of(served.url, key) as client:
                add(client, "same-name", make_router(1))
                found.append(salts(served, client, task="same-name") + salts(served, client))
    assert found[0] == found[1]
    assert len({salt for each in found for salt in each}) == 4


def test_tenants_have_salts_of_their_own_for_a_shared_task(
    served: Served, make_router: MakeRouter
) -> None:
    make_tenant(served.client, "guest")
    add(served.client, "one", make_router(1))
    served.client.put("/v1/tasks/one/shared_with/guest").raise_for_status()
    with client_of(served.url, make_key(served.client, "guest", "inference")) as guest:
        theirs = salts(served, guest, task="default:one")
        assert salts(served, guest, model="default:one") == theirs
    (own,) = salts(served, task="one")
    assert salts(served, task="default:one") == [own]
    assert theirs != [own]


def test_a_server_that_starts_again_makes_the_same_salts(
    tmp_path: Path, random_inventory: Inventory, tokenizer: PreTrainedTokenizerBase
) -> None:
    found = []
    for folder in ("one", "one", "two"):
        with serving(tmp_path / folder, random_inventory, tokenizer, FakeEngine()) as served:
            found += salts(served)
    assert found[0] == found[1] != found[2]


class CachingEngine(FakeEngine):
    """Found some of each prompt in its cache: as many tokens as it was told, request by request."""

    found: tuple[int, ...] = ()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        cached = self.found[len(self.requests)]
        async for chunk in super().generate(request):
            yield replace(chunk, cached=cached)


def cached_tokens(served: Served, engine: CachingEngine, *found: int, **body: object) -> object:
    engine.found = (0,) * len(engine.requests) + found
    usage = served.complete(max_tokens=2, **body).json()["usage"]
    return usage["prompt_tokens_details"]["cached_tokens"]


def test_usage_counts_a_prompts_cached_tokens_once(serve: Serve) -> None:
    engine = CachingEngine()
    served = serve(engine)
    assert cached_tokens(served, engine, 16) == 16
    assert cached_tokens(served, engine, 16, 32, prompt=["a", "b"]) == 48
    # Of a prompt's choices, the others found what the first of them computed.
    assert cached_tokens(served, engine, 0, 32, 16, 16, prompt=["a", "b"], n=2) == 16


def test_a_streams_usage_counts_cached_tokens(serve: Serve) -> None:
    engine = CachingEngine()
    engine.found = (32, 16)
    served = serve(engine)
    body = {"stream": True, "stream_options": {"include_usage": True}, "n": 2, "max_tokens": 2}
    *_, last, _done = [line for line in served.complete(**body).text.split("\n") if line]
    usage = json.loads(last.removeprefix("data: "))["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 16}


def test_metrics_count_what_was_looked_up_and_found(serve: Serve) -> None:
    class Counting(FakeEngine):
        def stats(self) -> EngineStats:
            return replace(super().stats(), prefix_queries=40, prefix_hits=32)

    text = serve(Counting()).client.get("/metrics").text
    labels = 'engine="0",model_name="base"'
    assert f"vllm:prefix_cache_queries_total{{{labels}}} 40.0" in text
    assert f"vllm:prefix_cache_hits_total{{{labels}}} 32.0" in text
