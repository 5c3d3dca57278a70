"""`polyrex tasks`, against a running server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from polyrex.server.http.auth import read_key_digests
from support.command_line import polyrex
from support.fake_server import Serve, Served
from support.random_inventory import MakeRouter


@pytest.fixture
def router(make_router: MakeRouter, tmp_path: Path) -> Path:
    file = tmp_path / "colour.safetensors"
    file.write_bytes(make_router(1))
    return file


def ask(served: Served, *arguments: object) -> dict[str, Any]:
    done = polyrex("tasks", *arguments, "--server", served.url)
    assert done.exit_code == 0, done.output
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_a_task_is_added_shown_replaced_listed_and_dropped(served: Served, router: Path) -> None:
    assert ask(served, "add", router)["name"] == "colour"
    assert ask(served, "add", router, "--name", "shade")["name"] == "shade"
    assert ask(served, "add", router, "--name", "shade", "--replace")["name"] == "shade"
    assert ask(served, "show", "shade")["name"] == "shade"
    listed = polyrex("tasks", "list", "--server", served.url).stdout
    assert [name in listed for name in ("colour", "shade")] == [True, True]
    ask(served, "drop", "shade")
    gone = polyrex("tasks", "show", "shade", "--server", served.url)
    assert (gone.exit_code, gone.stdout) == (1, "")
    assert gone.stderr == "polyrex tasks: no such task, or not for this key\n"


def test_a_dropped_task_is_listed_and_undeleted(served: Served, router: Path) -> None:
    ask(served, "add", router)
    ask(served, "drop", "colour")
    listed = polyrex("tasks", "list", "--server", served.url).stdout
    dropped = polyrex("tasks", "list", "--deleted", "--server", served.url).stdout
    assert ("colour" in listed, "colour" in dropped) == (False, True)
    assert ask(served, "undelete", "colour")["deleted"] is None


def test_tasks_are_found_by_text_and_labels(served: Served, router: Path) -> None:
    ask(served, "add", router, "--label", "team=a", "--label", "env=x")
    ask(served, "add", router, "--name", "shade", "--label", "team=a")
    ask(served, "add", router, "--name", "tone", "--replace", "--label", "team=b")

    def found(*options: str) -> list[str]:
        listed = polyrex("tasks", "list", *options, "--server", served.url).stdout
        return [name for name in ("colour", "shade", "tone") if name in listed]

    assert found() == ["colour", "shade", "tone"]
    assert found("--label", "team=a") == ["colour", "shade"]
    assert found("--label", "team=a", "--label", "env=x") == ["colour"]
    assert found("--query", "ON") == ["tone"]


def test_versions_are_listed_rolled_back_and_named(
    served: Served, router: Path, make_router: MakeRouter
) -> None:
    ask(served, "add", router)
    router.write_bytes(make_router(2, description="second"))
    ask(served, "add", router, "--replace")
    listed = polyrex("tasks", "versions", "colour", "--server", served.url).stdout
    assert "second" in listed
    assert ask(served, "rollback", "colour")["version"] == 1
    assert ask(served, "rollback", "colour", "--to", 2)["version"] == 2
    assert ask(served, "alias", "colour", "prod", 1)["aliases"] == {"prod": 1}
    assert ask(served, "show", "colour@prod")["version"] == 1
    assert ask(served, "unalias", "colour", "prod")["aliases"] == {}
    canary = ask(served, "canary", "colour", 1, 0.25)["canary"]
    assert (canary["version"], canary["share"]) == (1, 0.25)
    assert ask(served, "uncanary", "colour")["canary"] is None
    assert polyrex("tasks", "canary", "colour", 1, 2, "--server", served.url).exit_code == 2


def test_a_task_is_shared_with_another_tenant(served: Served, router: Path) -> None:
    ask(served, "add", router)
    served.client.post("/v1/tenants", json={"name": "guest"}).raise_for_status()
    assert ask(served, "share", "colour", "guest")["shared_with"] == ["guest"]
    assert ask(served, "unshare", "colour", "guest")["shared_with"] == []
    refused = polyrex("tasks", "share", "colour", "nobody", "--server", served.url)
    assert (refused.exit_code, refused.stdout) == (1, "")


def test_the_connection_may_stand_before_or_after_the_subcommand(
    serve: Serve, tmp_path: Path, router: Path
) -> None:
    (tmp_path / "key").write_text("secret\n")
    served = serve(api_key_digests=read_key_digests(tmp_path / "key"))
    connection = ("--server", served.url, "--api-key-file", tmp_path / "key")
    assert polyrex("tasks", "add", router, *connection).exit_code == 0
    before = polyrex("tasks", *connection, "show", "colour")
    after = polyrex("tasks", "show", "colour", *connection)
    split = polyrex("tasks", *connection[:2], "show", *connection[2:], "colour")
    assert before.exit_code == 0, before.output
    assert before == after == split
    assert "API key" in polyrex("tasks", *connection[:2], "show", "colour").stderr


def test_the_connection_comes_from_the_environment_or_a_file(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "polyrex.toml"
    file.write_text(f'[tasks]\nserver = "{served.url}"\n')
    assert polyrex("tasks", "list", "--config", file).exit_code == 0
    monkeypatch.setenv("POLYREX_TASKS_SERVER", "http://127.0.0.1:9")
    assert polyrex("tasks", "list", "--config", file).exit_code == 1
    monkeypatch.setenv("POLYREX_TASKS_SERVER", served.url)
    assert polyrex("tasks", "list").exit_code == 0


def test_a_server_that_is_not_there_is_named() -> None:
    done = polyrex("tasks", "list", "--server", "http://127.0.0.1:9")
    assert done.exit_code == 1
    assert done.stderr.startswith("polyrex tasks: http://127.0.0.1:9: ")


@contextmanager
def gateway(status: int, body: bytes) -> Iterator[str]:
    """The address of something that answers every request in its own way."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", "0")))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "body", "shown"),
    [
        (502, b"<html>\n  <b>Bad Gateway</b>\n" + b"x" * 1000, "<html> <b>Bad Gateway</b> xxx"),
        (429, b"slow down", "slow down"),
        (503, b'{"message": "no upstream"}', '{"message": "no upstream"}'),
        (500, b'"text"', '"text"'),
        (200, b"", ""),
        (200, b"\xff\x00", ""),
    ],
)
def test_what_is_not_the_servers_answer_is_told_in_one_line(
    tmp_path: Path, status: int, body: bytes, shown: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input": "a", "answer": "b"}\n')
    fit = ("fit", "--task", "a", "--rows", rows, "--instruction", "b")
    with gateway(status, body) as url:
        for command in (("tasks", "list"), fit) if status != 200 else (("tasks", "list"),):
            done = polyrex(*command, "--server", url)
            assert done.exit_code == 1
            assert f": status {status}, not from polyrex: {shown}" in done.stderr
            assert done.stderr.count("\n") == 1
            assert len(done.stderr) < 400


def test_a_key_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "letters").write_text("schlüssel\n")
    (tmp_path / "control").write_text("a\0b\n")
    for name in ("no-such-file", "empty", "letters", "control"):
        done = polyrex("tasks", "list", "--api-key-file", tmp_path / name)
        assert done.exit_code == 1
        assert done.stderr.startswith(f"polyrex tasks: {tmp_path / name}: ")


def test_add_names_a_file_that_is_not_there() -> None:
    done = polyrex("tasks", "add", "no-such.safetensors")
    assert done.exit_code == 2
    assert "no-such.safetensors" in done.stderr
