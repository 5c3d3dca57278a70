"""What the proofs run on: a tiny base model with its inventory, and empty registries."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.reliability.small_base import SmallBase


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> SmallBase:
    """The tiny model, made once."""
    folder: Path = tmp_path_factory.mktemp("small-base")
    return SmallBase.write(folder)
