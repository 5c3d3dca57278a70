"""The server that is fuzzed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from reliability.fuzz.served import Served, serving
from support.reliability.small_base import SmallBase


@pytest.fixture(scope="session")
def fuzzed(small_base: SmallBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server without defects that anybody knows of."""
    with serving(small_base, tmp_path_factory.mktemp("fuzzed")) as served:
        yield served
