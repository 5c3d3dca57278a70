"""A tenant guesses at the tasks of another, over every route that takes a name."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import httpx

from .identities import client_of, make_key, make_tenant

SECRETS = ("merger-plan", "payroll-2026", "dropped-plan")
"""The names of the tasks that nobody else may learn of; the last one is dropped."""
OWNER = "acme"
GUESSER = "rival"
LORA_FILE = "guess.safetensors"

_SELECTORS = ("", "", "@1", "@2", "@3", "@prod", "@no-such-alias")

Send = Callable[[httpx.Client, str], httpx.Response]


def _at(method: str, path: str, body: object = None) -> Send:
    def send(client: httpx.Client, guess: str) -> httpx.Response:
        filled = path.replace("{}", quote(guess, safe=""))
        json = {} if body is None and method != "GET" else body
        return client.request(method, filled, json=json)

    return send


def _field(path: str, name: str, body: Mapping[str, object]) -> Send:
    return lambda client, guess: client.post(path, json={**body, name: guess})


_PROMPT = {"prompt": "x", "max_tokens": 1}
_CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}

READS: Mapping[str, Send] = {
    "completions, task": _field("/v1/completions", "task", _PROMPT),
    "completions, model": _field("/v1/completions", "model", _PROMPT),
    "chat, task": _field("/v1/chat/completions", "task", _CHAT),
    "chat, model": _field("/v1/chat/completions", "model", _CHAT),
    "model": _at("GET", "/v1/models/{}"),
    "task": _at("GET", "/v1/tasks/{}"),
    "versions": _at("GET", "/v1/tasks/{}/versions"),
}
EDITS: Mapping[str, Send] = {
    "drop": _at("DELETE", "/v1/tasks/{}"),
    "undelete": _at("POST", "/v1/tasks/{}/undelete"),
    "roll back": _at("POST", "/v1/tasks/{}/rollback", {"version": 1}),
    "set alias": _at("PUT", "/v1/tasks/{}/aliases/mine", {"version": 1}),
    "remove alias": _at("DELETE", "/v1/tasks/{}/aliases/prod"),
    "set canary": _at("PUT", "/v1/tasks/{}/canary", {"version": 1, "share": 0.5}),
    "remove canary": _at("DELETE", "/v1/tasks/{}/canary"),
    "share": _at("PUT", "/v1/tasks/{}/shared_with/rival"),
    "unshare": _at("DELETE", "/v1/tasks/{}/shared_with/rival"),
    "labels": _at("PUT", "/v1/tasks/{}/labels", {"mine": "yes"}),
}
_OCTETS = {"content-type": "application/octet-stream"}
_ROW = {"input": "x", "answer": "yes", "options": ["yes", "no"]}
_FIT = {"instruction": "x", "rows": [_ROW] * 8}


def _writes(router: bytes) -> Mapping[str, Send]:
    """The routes that register: what they are sent would be taken, if the name were one's own."""
    in_json = {"router": base64.b64encode(router).decode()}
    loaded = {"lora_path": LORA_FILE}
    return {
        "register": lambda client, guess: client.post(
            "/v1/tasks", params={"name": guess}, content=router, headers=_OCTETS
        ),
        "register, JSON": _field("/v1/tasks", "name", in_json),
        "replace": lambda client, guess: client.put(
            f"/v1/tasks/{quote(guess, safe='')}", content=router, headers=_OCTETS
        ),
        "fit": _at("POST", "/v1/tasks/{}/fit", _FIT),
        "fit, replace": _at("POST", "/v1/tasks/{}/fit", {**_FIT, "replace": True}),
        "load adapter": _field("/v1/load_lora_adapter", "lora_name", loaded),
        "load adapter in place": _field(
            "/v1/load_lora_adapter", "lora_name", {**loaded, "load_inplace": True}
        ),
        UNLOAD: _field("/v1/unload_lora_adapter", "lora_name", {}),
    }


UNLOAD = "unload adapter"
"""Its error is vLLM's, which repeats the name that was asked for."""
WRITES = frozenset(_writes(b""))
"""What these are asked for names a tenant: a name without one would be the asker's own to take."""
ROUTES = sorted({*READS, *EDITS, *WRITES})


@dataclass
class Guessing:
    """What a tenant could learn: by route, the different answers; and names that showed up."""

    asked: int = 0
    answers: dict[str, set[tuple[int, bytes]]] = field(default_factory=dict)
    leaks: list[str] = field(default_factory=list)
    before: list[object] = field(default_factory=list)
    after: list[object] = field(default_factory=list)


def guess_at_tasks(
    operator: httpx.Client,
    lora_dir: Path,
    routers: tuple[bytes, bytes],
    guesses: int,
    seed: int = 0,
) -> Guessing:
    """Let one tenant register tasks, and another one guess at them, `guesses` requests in all.

    `operator` administers a server without tenants of their own, which loads files below
    `lora_dir`; `routers` are two that it takes.
    """
    found = Guessing()
    make_tenant(operator, OWNER)
    make_tenant(operator, GUESSER)
    _write_lora(lora_dir, routers[1])
    sends = {**READS, **EDITS, **_writes(routers[1])}
    url = str(operator.base_url)
    with (
        client_of(url, make_key(operator, OWNER, "task-admin")) as owner,
        client_of(url, make_key(operator, GUESSER, "task-admin")) as rival,
    ):
        _register(owner, routers)
        found.before = _tasks_of(owner)
        draw = random.Random(seed)
        for number in range(guesses):
            route = ROUTES[number % len(ROUTES)]
            guess = _foreign(draw) if route in WRITES else _guess(draw)
            response = sends[route](rival, guess)
            body = response.content
            if route == UNLOAD:
                body = body.replace(f"'{guess}'".encode(), b"'...'")
            found.answers.setdefault(route, set()).add((response.status_code, body))
            found.asked += 1
        found.leaks = _leaks(rival, operator)
        found.after = _tasks_of(owner)
    return found


def _write_lora(lora_dir: Path, router: bytes) -> None:
    """The file that is to be loaded, wherever the guessing tenant's files are looked for."""
    for folder in (lora_dir, lora_dir / GUESSER):
        folder.mkdir(exist_ok=True)
        (folder / LORA_FILE).write_bytes(router)


def _register(owner: httpx.Client, routers: tuple[bytes, bytes]) -> None:
    for name in SECRETS:
        for data in routers:
            owner.put(
                f"/v1/tasks/{name}",
                content=data,
                headers={"content-type": "application/octet-stream"},
            ).raise_for_status()
        owner.put(f"/v1/tasks/{name}/aliases/prod", json={"version": 1}).raise_for_status()
    owner.delete(f"/v1/tasks/{SECRETS[-1]}").raise_for_status()


def _guess(draw: random.Random) -> str:
    """A name, in every form: most are of a task that is there."""
    name = draw.choice((*SECRETS, *SECRETS, "no-such-task", f"t{draw.randrange(10**6)}"))
    if draw.random() < 0.1:
        return str(draw.randrange(1, 9))  # the id of a row
    tenant = draw.choice(("", f"{OWNER}:", f"{OWNER}:", f"{GUESSER}:", "no-such-tenant:"))
    return f"{tenant}{name}{draw.choice(_SELECTORS)}"


def _foreign(draw: random.Random) -> str:
    """A name below another tenant, in every form."""
    name = draw.choice((*SECRETS, *SECRETS, "no-such-task", f"t{draw.randrange(10**6)}"))
    tenant = draw.choice((OWNER, OWNER, "no-such-tenant"))
    return f"{tenant}:{name}{draw.choice(_SELECTORS)}"


def _tasks_of(owner: httpx.Client) -> list[object]:
    pages = [owner.get("/v1/tasks", params={"deleted": deleted}) for deleted in (False, True)]
    shown: list[object] = [page.raise_for_status().json()["data"] for page in pages]
    return shown


_KNOWN = ("metrics", OWNER)


def _leaks(rival: httpx.Client, operator: httpx.Client) -> list[str]:
    """Where another tenant, or a reader of metrics, finds a name that is none of his.

    Who reads metrics may know which tenants there are, but not of tasks that nobody has used.
    """
    asked = {
        "models": rival.get("/v1/models"),
        "tasks": rival.get("/v1/tasks"),
        "deleted tasks": rival.get("/v1/tasks", params={"deleted": True}),
        "search": rival.get("/v1/tasks", params={"q": "plan"}),
        "page": rival.get("/v1/tasks", params={"after": "a"}),
        "whoami": rival.get("/v1/whoami"),
        "metrics": operator.get("/metrics"),
    }
    return [
        f"{where}: {name}"
        for where, response in asked.items()
        for name in (*SECRETS, OWNER)
        if response.status_code != 200 or (name in response.text and (where, name) != _KNOWN)
    ]
