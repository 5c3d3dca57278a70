"""One tenant asks for ten times what the server can do, beside one that asks for half its share.

The second must hardly notice: it is never refused, and its answers take at most half as long again
as when it is alone. The engine is a stub whose step takes a set time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reliability.result import Result
from support.reliability.client import Client
from support.reliability.fork_server import ForkServer
from support.reliability.stress.loads import Plan, Sent, p99, run_loads

from .overload import CAPACITY, STUB, TIMES, TOKENS

OPERATOR_KEY = "the-operators-key"
SHARE = CAPACITY / 2  # of each of two tenants, in requests a second
SLOWER = 1.5
_GOOD = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}


def _flow(name: str, key: str, rate: float, network: int) -> Mapping[str, Any]:
    body = json.dumps({"prompt": [network, *range(40)], **_GOOD})
    flow = {"name": name, "kind": "request", "rate": rate, "path": "/v1/completions", "body": body}
    return flow | {"key": key, "addresses": 50, "network": network}


def _make_key(client: Client, tenant: str) -> str:
    made = client.post(f"/v1/tenants/{tenant}/keys", {"role": "inference"})
    key: str = made.json()["key"]
    return key


def fairness(
    forks: ForkServer, folder: Path, *, seconds: float, timed: bool = True, one_tenant: bool = False
) -> Result:
    """Let the modest tenant ask alone, and then beside the other, for so many seconds each.

    `timed`: whether times are judged. `one_tenant`: a planted defect, both are the same tenant.
    """
    url = f"sqlite:///{folder / 'registry.db'}"
    with forks.serving(url, engine="stub", stub=STUB, keys=[OPERATOR_KEY]) as server:
        with server.client(OPERATOR_KEY) as client:
            for name in ("modest", "greedy"):
                client.post("/v1/tenants", {"name": name})
            modest = _make_key(client, "modest")
            greedy = _make_key(client, "modest" if one_tenant else "greedy")
        own = _flow("modest", modest, SHARE / 2, 1)
        (alone,) = run_loads(server.port, Plan([own], seconds))
        beside, other = run_loads(
            server.port,
            Plan([own], seconds),
            Plan([_flow("greedy", greedy, TIMES * CAPACITY, 2)], seconds),
        )
    lag = max(found.lag_p99 for found in (alone, beside, other))
    figures = _figures(alone.flows["modest"], beside.flows["modest"], other.flows["greedy"])
    times = {"p99 of the modest one, of that alone": SLOWER, "p99 of the load's own lag in ms": 50}
    return Result(
        goal=f"one tenant at {TIMES} times what the server can do beside one at half its share",
        length=f"{seconds:g} s alone and beside it",
        figures=figures | {"p99 of the load's own lag in ms": round(1000 * lag, 1)},
        at_most={"not served of the modest one": 0, **(times if timed else {})},
        at_least={"served of the modest one": 1, "refused of the greedy one": 1},
    )


def _figures(
    alone: Sequence[Sent], beside: Sequence[Sent], other: Sequence[Sent]
) -> dict[str, float]:
    before, after = (p99([s.end for s in sent if s.served and s.end]) for sent in (alone, beside))
    first = [p99([s.first for s in sent if s.served and s.first]) for sent in (alone, beside)]
    return {
        "served of the modest one": sum(sent.served for sent in beside),
        "not served of the modest one": sum(not sent.served for sent in (*alone, *beside)),
        "served of the greedy one": sum(sent.served for sent in other),
        "refused of the greedy one": sum(sent.refused for sent in other),
        "p99 of the modest one alone in ms": round(1000 * before),
        "p99 of the modest one, of that alone": round(after / max(before, 1e-3), 2),
        "p99 of its first token alone in ms": round(1000 * first[0]),
        "p99 of its first token beside the other in ms": round(1000 * first[1]),
    }
