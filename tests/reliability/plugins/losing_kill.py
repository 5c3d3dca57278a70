"""A pytest plugin that plants a defect: whoever kills a process loses the newest task, too."""

from __future__ import annotations

import psutil
import psycopg
import pytest

from support.storage.postgres import Cluster

_LOSE = "UPDATE tasks SET deleted = 1 WHERE id = (SELECT max(id) FROM tasks)"


@pytest.fixture(autouse=True)
def planted_defect(monkeypatch: pytest.MonkeyPatch, postgres_cluster: Cluster) -> None:
    """Lose a task of every database of the cluster."""
    kill = psutil.Process.kill

    def losing_kill(process: psutil.Process) -> None:
        kill(process)
        with psycopg.connect(postgres_cluster.url(), autocommit=True) as server:
            found = server.execute("SELECT datname FROM pg_database WHERE datname LIKE 'test%'")
            names = [str(name) for (name,) in found]
        for name in names:
            with psycopg.connect(postgres_cluster.url(name), autocommit=True) as database:
                database.execute(_LOSE)

    monkeypatch.setattr(psutil.Process, "kill", losing_kill)
