"""Poisons amid streams on vLLM, and the death of its processes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from reliability.proofs.stress.engine_dies import vllm_dies
from reliability.proofs.stress.poison import poison_vllm
from support.reliability.small_base import SmallBase


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallBase:
    folder: Path = tmp_path_factory.mktemp("small-base")
    return SmallBase.write(folder)


def test_no_poison_breaks_a_stream(small: SmallBase, tmp_path: Path) -> None:
    result = poison_vllm(small, tmp_path, count=320)
    assert result.missed == [], result.remarks


def test_a_killed_engine_is_told_of_and_comes_back(small: SmallBase, tmp_path: Path) -> None:
    result = vllm_dies(small, tmp_path, signal.SIGKILL, times=1, within=20)
    assert result.missed == [], result.remarks
