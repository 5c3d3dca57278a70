"""Kernels for one processor do not depend on those for another."""

from __future__ import annotations

from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"


@pytest.mark.parametrize(("room", "other"), [("cpu", "gpu"), ("gpu", "cpu")])
def test_cpu_and_gpu_do_not_import_each_other(room: str, other: str) -> None:
    files = sorted((KERNELS / room).rglob("*.py"))
    assert files
    for path in files:
        assert f"kernels.{other}" not in path.read_text(), path.name
