"""How many threads OpenMP gets, and how long they spin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from polyrex.kernels.cpu import threads
from polyrex.kernels.cpu.threads import cgroup_cores, describe_threads, thread_variables


def test_a_quota_is_read_from_either_version_of_cgroups(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(threads, "_CGROUP", tmp_path)
    assert cgroup_cores() is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("150000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_cores() == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cgroup_cores() is None
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert cgroup_cores() == 0.5


@pytest.mark.parametrize(
    ("quota", "expected"), [(None, None), (64.0, None), (2.5, "2"), (0.5, "1")]
)
def test_there_are_as_many_threads_as_cores_are_granted(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: str | None
) -> None:
    monkeypatch.setattr(threads, "cgroup_cores", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    assert thread_variables({}).get("OMP_NUM_THREADS") == expected
    assert "OMP_NUM_THREADS" not in thread_variables({"OMP_NUM_THREADS": "3"})


@pytest.mark.parametrize("own", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_what_the_user_has_chosen_stays(own: str) -> None:
    assert thread_variables({})["GOMP_SPINCOUNT"] == "1000"
    assert "GOMP_SPINCOUNT" not in thread_variables({own: "7"})
    assert f"{own}=7" in describe_threads({own: "7"})


def test_openmp_gets_the_bound_before_torch_is_loaded() -> None:
    script = (
        "import os, sys; from polyrex.server.cli.main import main; main(['--version']);"
        "print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    )
    mine = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=mine, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-2:] == ["1000", "False"]
