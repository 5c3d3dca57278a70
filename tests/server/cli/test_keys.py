"""`polyrex keys` and `polyrex tenants`, against a running server."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from polyrex.server.http.auth import read_key_digests
from support.command_line import Finished, polyrex
from support.fake_server import Serve, Served
from support.tenants.identities import bearer


class Operator:
    """Runs commands with the key of the key file."""

    def __init__(self, served: Served, key_file: Path) -> None:
        self._connection = ("--server", served.url, "--api-key-file", key_file)

    def run(self, *arguments: object) -> Finished:
        return polyrex(*arguments, *self._connection)

    def ask(self, *arguments: object) -> str:
        done = self.run(*arguments)
        assert done.exit_code == 0, done.output
        return done.stdout

    def ask_json(self, *arguments: object) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.ask(*arguments))
        return answer


@pytest.fixture
def served(serve: Serve, tmp_path: Path) -> Served:
    (tmp_path / "key").write_text("the-operators-key\n")
    return serve(api_key_digests=read_key_digests(tmp_path / "key"))


@pytest.fixture
def operator(served: Served, tmp_path: Path) -> Operator:
    return Operator(served, tmp_path / "key")


def status(served: Served, key: str) -> int:
    return served.client.get("/v1/models", headers=bearer(key)).status_code


def test_a_key_is_made_listed_rotated_and_revoked(served: Served, operator: Operator) -> None:
    operator.ask("tenants", "create", "acme")
    made = operator.ask("keys", "create", "--tenant", "acme", "--role", "inference")
    key = made.strip()
    key_id = key.split("_")[1]
    assert (made, status(served, key)) == (f"{key}\n", 200)
    assert key_id in operator.ask("keys", "list", "--tenant", "acme")
    assert key not in operator.ask("keys", "list", "--tenant", "acme")
    new = operator.ask("keys", "rotate", key_id, "--grace-hours", "1").strip()
    assert (status(served, key), status(served, new)) == (200, 200)
    revoked = operator.ask_json("keys", "revoke", new.split("_")[1])
    assert revoked["revoked"] is not None
    assert (status(served, key), status(served, new)) == (200, 401)


def test_a_new_key_goes_to_a_file_that_its_owner_alone_can_read(
    served: Served, operator: Operator, tmp_path: Path
) -> None:
    out = tmp_path / "app.key"
    options = ("--role", "task-admin", "--label", "app", "--expires-in-days", "7", "--out", out)
    shown = operator.ask_json("keys", "create", *options)
    key = out.read_text().strip()
    assert (shown["label"], "key" in shown, key in str(shown)) == ("app", False, False)
    assert shown["expires"] - shown["created"] == pytest.approx(7 * 24 * 3600, abs=2)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert status(served, key) == 200


def test_a_file_that_exists_is_not_written_and_no_key_is_made(
    operator: Operator, tmp_path: Path
) -> None:
    out = tmp_path / "taken"
    out.write_text("mine")
    done = operator.run("keys", "create", "--role", "inference", "--out", out)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"polyrex keys: {out}: ")
    assert out.read_text() == "mine"
    assert "inference" not in operator.ask("keys", "list")


def test_a_refusal_leaves_no_file(operator: Operator, tmp_path: Path) -> None:
    out = tmp_path / "app.key"
    options = ("--tenant", "nobody", "--role", "inference", "--out", out)
    done = operator.run("keys", "create", *options)
    assert done.exit_code == 1
    assert "nobody" in done.stderr
    assert not out.exists()


def test_a_tenant_is_made_changed_and_listed(served: Served, operator: Operator) -> None:
    made = operator.ask_json("tenants", "create", "acme", "--tasks", "100", "--concurrent", "4")
    assert (made["quotas"]["tasks"], made["quotas"]["bytes"]) == (100, None)
    limits = ("--concurrent", "unlimited", "--tokens-per-minute", "5000")
    changed = operator.ask_json("tenants", "set", "acme", *limits)["quotas"]
    assert (changed["tasks"], changed["concurrent"]) == (100, None)
    assert changed["tokens_per_minute"] == 5000
    assert operator.ask_json("tenants", "set", "acme", "--disabled")["disabled"]
    listed = operator.ask("tenants", "list")
    assert [word in listed for word in ("acme", "default", "5000", "yes")] == [True] * 4
    assert not operator.ask_json("tenants", "set", "acme", "--enabled")["disabled"]


@pytest.mark.parametrize("limit", ["-1", "1.5", "many"])
def test_a_limit_is_a_number_or_unlimited(limit: str) -> None:
    done = polyrex("tenants", "set", "acme", "--tasks", limit)
    assert done.exit_code == 2
    assert "--tasks" in done.stderr


def test_no_command_takes_a_key_as_an_argument() -> None:
    for command in ("keys create", "keys list", "keys rotate", "keys revoke", "tenants set"):
        options = polyrex(*command.split(), "--help").stdout
        assert "--api-key-file" in options
        assert "--api-key " not in options
