"""A registry of many tasks, and a folder that two servers want, at the length of `make test`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from sqlalchemy import event
from starlette.testclient import TestClient
from transformers import PreTrainedTokenizerBase

from polyrex.server.config import ServerConfig
from polyrex.server.http.app import create_app
from polyrex.server.registry.database import Database
from polyrex.server.registry.registry import TaskRegistry
from reliability.proofs.many_tasks import SIZES, TIMES, fill, many_tasks
from reliability.proofs.two_servers import two_servers
from support.fake_server import FakeEngine
from support.reliability.fork_server import ForkServer
from support.reliability.planted import HOARDING, LABELLED, SLOW
from support.reliability.small_base import SmallBase


def test_ten_thousand_tasks_take_little_memory(forks: ForkServer, tmp_path: Path) -> None:
    result = many_tasks(forks, tmp_path, count=10_000)
    assert result.missed == []
    assert set(result.figures) == set(SIZES)


def test_whatever_many_tasks_cost_is_found(forks: ForkServer, tmp_path: Path) -> None:
    defects = [HOARDING, LABELLED, SLOW]
    result = many_tasks(forks, tmp_path, count=10_000, samples=10, defects=defects)
    assert set(result.figures) == {*SIZES, *TIMES}
    assert result.finds([*SIZES, *TIMES]), result.figures


def test_ten_thousand_models_are_listed_from_memory(
    small_base: SmallBase, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    url, statements, names = f"sqlite:///{tmp_path / 'registry.db'}", list[str](), set[str]()
    fill(small_base, url, 10_000)
    with closing(TaskRegistry(Database(url), small_base.read_inventory())) as registry:
        app = create_app(ServerConfig(model="base"), FakeEngine(), registry, tokenizer)
        event.listen(
            registry.database.engine,
            "before_cursor_execute",
            lambda *call: statements.append(call[2]),
        )
        client = TestClient(app, "http://localhost")  # without lifespan: nothing else is done
        more, after = True, dict[str, str]()
        while more:
            page = client.get("/v1/models", params={"limit": 1000, **after}).json()
            names |= {model["id"] for model in page["data"]}
            more, after = page["has_more"], {"after": page["data"][-1]["id"]}
        listed = list(statements)
        client.get("/v1/tasks")
    assert names == {"base", *(f"task-{number}" for number in range(1, 10_001))}
    assert listed == []  # so no router was read, either
    assert statements != []


def test_a_second_server_on_a_folder_refuses_to_start(
    small_base: SmallBase, tmp_path: Path
) -> None:
    result = two_servers(small_base, tmp_path)
    assert result.missed == [], result.remarks


def test_a_second_server_that_starts_is_found(small_base: SmallBase, tmp_path: Path) -> None:
    result = two_servers(small_base, tmp_path, same_folder=False)
    assert result.figures["second servers that refused to start"] == 0
    assert not result.passed
