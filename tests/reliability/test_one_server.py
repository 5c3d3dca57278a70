"""A registry of many tasks, and a folder that two servers want, at the length of `make test`."""

from __future__ import annotations

from pathlib import Path

from reliability.proofs.many_tasks import many_tasks
from reliability.proofs.two_servers import two_servers
from support.reliability.fork_server import ForkServer
from support.reliability.planted import HOARDING, LABELLED
from support.reliability.small_base import SmallBase


def test_ten_thousand_tasks_take_little_memory(forks: ForkServer, tmp_path: Path) -> None:
    result = many_tasks(forks, tmp_path, count=10_000, timed=False)
    assert result.missed == []
    assert result.figures["memory in MiB"] > 0


def test_memory_and_labels_for_each_task_are_found(forks: ForkServer, tmp_path: Path) -> None:
    defects = [HOARDING, LABELLED]
    result = many_tasks(forks, tmp_path, count=5_000, timed=False, defects=defects)
    assert set(result.figures) == {"memory in MiB", "/metrics in KiB"}
    assert len(result.missed) == 2


def test_a_second_server_on_a_folder_refuses_to_start(
    small_base: SmallBase, tmp_path: Path
) -> None:
    result = two_servers(small_base, tmp_path)
    assert result.missed == [], result.remarks


def test_a_second_server_that_starts_is_found(small_base: SmallBase, tmp_path: Path) -> None:
    result = two_servers(small_base, tmp_path, same_folder=False)
    assert result.figures["second servers that refused to start"] == 0
    assert not result.passed
