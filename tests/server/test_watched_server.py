"""What a real server's processes open, connect to and start, whatever is asked of them.

They tell by Python's audit events (tests/support/watched/sitecustomize.py). What SQLite, torch and
other libraries in C open by themselves is not among those.
"""

from __future__ import annotations

import json
import random
import re
import signal
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest

from polyrex.adapters.task_name import TASK_NAME
from support.random_inventory import random_router
from support.reliability.client import Answer, Client
from support.reliability.small_base import SmallBase
from support.watched.server import KEY, Event, Watched, watched_server

FILES = frozenset(
    {
        "ctypes.dlopen",
        "open",
        "os.link",
        "os.listdir",
        "os.mkdir",
        "os.remove",
        "os.rename",
        "os.scandir",
        "os.symlink",
        "sqlite3.connect",
    }
)
ROWS = [{"input": f"{n % 16:x}", "answer": "ab"[n % 2], "options": ["a", "b"]} for n in range(1024)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallBase:
    made = SmallBase.write(tmp_path_factory.mktemp("small"))
    settings = made.base / "tokenizer_config.json"
    ends = {"eos_token": "<16>"}  # or nothing could be fitted: an answer has to end
    settings.write_text(json.dumps(json.loads(settings.read_text()) | ends))
    return made


@pytest.fixture(scope="module")
def watched(small: SmallBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with watched_server(small, tmp_path_factory.mktemp("watched")) as server:
        yield server


@pytest.fixture
def client(watched: Watched) -> Iterator[Client]:
    with watched.client() as connected:
        yield connected


PARTS = (
    *("..", ".", "/", "\\", "%2e%2e", "%2f", "%00", "\0", "~", "etc", "passwd", "proc", "self"),
    *("‥", "．．", "／", "∕", "\u202e", "\u200b", "con", "nul", "C:", "file:", "//", "environ"),
    *("{0}", "$HOME", "`id`", "\n", "\t", " ", "a", "A", "@", "@1", ":", "default:", "é", "\x7f"),
    *("a" * 65, "x" * 300, ".safetensors", "registry.db", "-wal", "*", "?", "#", "%", "\ud800"),
)


def names(count: int) -> list[str]:
    """Names that no task can have, the same ones every time."""
    drawn = random.Random("names")
    found: list[str] = []
    while len(found) < count:
        name = "".join(drawn.choices(PARTS, k=drawn.randint(1, 6)))
        if not TASK_NAME.fullmatch(name.removeprefix("default:")):
            found.append(name)
    return found


def in_path(name: str) -> str:
    return quote(name.encode(errors="surrogatepass"), safe="")


def answers_about(client: Client, router: bytes, name: str, turn: int) -> list[Answer]:
    """Ask for a completion by a task of this name, for a file of this name, and in one other way,
    which the turn chooses."""
    path = in_path(name)
    fit = {"instruction": "a", "rows": ROWS[:8]}
    ways = (
        lambda: client.send("GET", f"/v1/tasks/{path}"),
        lambda: client.put(path, router),
        lambda: client.send("DELETE", f"/v1/tasks/{path}"),
        lambda: client.post("/v1/tasks", {"name": name, "router": "AAAA"}),
        lambda: client.post(f"/v1/tasks/{path}/fit", fit),
        lambda: client.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": "a"}),
        lambda: client.send("GET", f"/v1/models/{path}"),
        lambda: client.post("/v1/tenants", {"name": name}),
    )
    return [
        client.post("/v1/completions", {"prompt": "a", "max_tokens": 1, "task": name}),
        client.post("/v1/load_lora_adapter", {"lora_name": "file", "lora_path": name}),
        ways[turn % len(ways)](),
    ]


def elsewhere(watched: Watched, events: list[Event]) -> list[Event]:
    """The events about files that lie neither in the state folder nor in that of --lora-dir.

    The server looks whether the engine's process goes on by what the system says of it.
    """
    roots = (watched.state.resolve(), watched.loras.resolve())
    return [
        event
        for event in events
        if event.name in FILES
        and isinstance(event.what, str)
        and not re.fullmatch(r"/proc/\d+/stat", event.what)
        and not any(watched.path(event.what).is_relative_to(root) for root in roots)
    ]


def test_no_name_makes_the_server_touch_a_file_outside_its_folders(
    watched: Watched, client: Client, small: SmallBase
) -> None:
    router = random_router(small.read_inventory(), 1)
    known = [str(watched.state / "registry.db"), "../tasks/registry.db", "/etc/passwd"]
    asked = [*names(2000), *known]
    for turn, name in enumerate(asked[:8]):  # what Python imports for a first request of a kind
        answers_about(client, router, name, turn)
    since = watched.noted()
    answers = [
        answer
        for turn, name in enumerate(asked)
        for answer in answers_about(client, router, name, turn)
    ]
    assert len(answers) == 3 * len(asked)
    assert {answer.status for answer in answers} <= {400, 404, 405, 409, 415, 422}
    assert elsewhere(watched, watched.events(since)) == []


def test_what_would_be_found_is_noted(watched: Watched, client: Client) -> None:
    """The folder of --lora-dir may be read, and one beside it would be seen."""
    (watched.loras / "file.safetensors").write_bytes(b"no router")
    since = watched.noted()
    body = {"lora_name": "file", "lora_path": "file.safetensors"}
    assert client.post("/v1/load_lora_adapter", body).status == 422
    opened = [event.what for event in watched.events(since) if event.name == "open"]
    assert opened[0] == str(watched.loras.resolve())
    assert elsewhere(watched, [Event("open", str(watched.folder / "keys"), 1)])
    assert elsewhere(watched, [Event("open", "../tasks-of-another/registry.db", 1)])


def fitted(client: Client) -> list[dict[str, Any]]:
    """The events of a fit, without the last one, [DONE]."""
    body = {"instruction": "a", "rows": ROWS[:16]}
    answer = client.post("/v1/tasks/fitted/fit", body)
    lines = [line.removeprefix(b"data: ") for line in answer.body.split(b"\n\n") if line]
    assert lines[-1] == b"[DONE]", lines[-1]
    return [json.loads(line) for line in lines[:-1]]


def ask_for_everything(client: Client, router: bytes) -> None:
    """A request to every kind of route, each of which works."""
    assert client.put("mine", router).status == 201
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "task": "mine"}
    assert client.post("/v1/chat/completions", chat).status == 200
    assert client.complete("mine", 4, [1, 2, 3]).text() is not None
    for path in ("/", "/docs", "/metrics", "/openapi.json", "/v1/models", "/v1/tasks", "/readyz"):
        assert client.send("GET", path).status == 200
    assert client.post("/v1/tenants", {"name": "acme"}).status == 201
    assert client.post("/v1/tenants/acme/keys", {"role": "inference"}).status == 201
    assert fitted(client)[-1]["event"] in ("registered", "refused")
    assert client.send("DELETE", "/v1/tasks/mine").status in (200, 204)


def test_no_request_makes_the_server_connect_unpickle_or_run_anything(
    watched: Watched, client: Client, small: SmallBase
) -> None:
    since = watched.noted()
    ask_for_everything(client, random_router(small.read_inventory(), 2))
    events = watched.events(since)
    of_kind = {
        name: [event.what for event in events if event.name == name]
        for name in ("pickle.find_class", "os.system", "os.exec", "socket.sendto")
    }
    assert of_kind == {name: [] for name in of_kind}
    family = {process.pid for process in watched.family()}
    started = [event for event in events if event.name == "subprocess.Popen"]
    by_server = [event.what[-1] for event in started if event.process in family]
    assert by_server == ["polyrex.training.fit_worker"]
    by_worker = [event.what[0] for event in started if event.process not in family]
    assert by_worker == ["git"]  # for the commit, which is written into the router


def test_the_server_connects_to_nobody_from_its_start_on(watched: Watched) -> None:
    """And asks no name server, though nothing but itself keeps it from the network."""
    events = watched.events()
    assert len(events) > 1000
    found = [event for event in events if event.name in ("socket.connect", "socket.getaddrinfo")]
    assert [event for event in found if not is_here(event.what)] == []


def is_here(address: Any) -> bool:
    """Whether an address is one of this machine: of a Unix socket, or of loopback."""
    host = address[0] if isinstance(address, list) else address
    return host in ("127.0.0.1", "::1", "localhost") or str(host).startswith(("/", "\0"))


def test_one_port_is_listened_to_by_the_server_and_all_that_it_starts(watched: Watched) -> None:
    listening = [
        (tuple(connection.laddr), process.pid)
        for process in watched.family()
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN or not connection.raddr
    ]
    assert listening == [(("127.0.0.1", watched.port), watched.process.pid)]


def test_files_of_the_state_are_for_their_owner_alone(watched: Watched) -> None:
    modes = {path: oct(path.stat().st_mode & 0o077) for path in watched.state.rglob("*")}
    assert set(modes.values()) == {"0o0"}
    assert oct(watched.state.stat().st_mode & 0o777) == "0o700"


def worker_of(watched: Watched) -> psutil.Process | None:
    """The process that fits a task, once it runs."""
    for process in watched.family():
        if "polyrex.training.fit_worker" in process.cmdline():
            return process
    return None


def test_a_fit_ends_with_its_server_and_leaves_nothing(small: SmallBase, tmp_path: Path) -> None:
    with watched_server(small, tmp_path / "killed") as server:
        before = sorted((server.folder / "temporary").iterdir())
        connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
        body = json.dumps({"instruction": "a", "rows": ROWS}).encode()
        headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
        connection.request("POST", "/v1/tasks/fitted/fit", body, headers)
        response = connection.getresponse()
        assert b"started" in response.readline()
        worker = worker_of(server)
        assert worker is not None
        assert sorted((server.folder / "temporary").iterdir()) == before
        server.process.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs([worker], timeout=60)
        assert alive == []
        assert sorted((server.folder / "temporary").iterdir()) == before
        connection.close()
